"""Preprocess beside Pillow and torchvision, in one run, one core each.

    pip install pillow numpy            # torch and torchvision too, for their lines
    python benches/preprocess.py [--rounds N]

Rounds alternate between ghostwatch (`cargo bench --bench preprocess`) and the others, and the
median of the rounds' medians is printed, so that a busy machine slows all of them down. Pillow and
torchvision start from a decoded RGB picture: the I420 lines of ghostwatch include the colour
conversion that the others would need first.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import time

import numpy as np
from PIL import Image

SIZES = [(640, 360), (1280, 720), (1920, 1080), (3840, 2160)]
FRAMES = 8
ROOT = pathlib.Path(__file__).parent.parent


def pillow(image):
    """Resize(256), CenterCrop(224) as torchvision does them, without its calls."""
    width, height = image.size
    short = min(width, height)
    wide, high = (256 * width // short, 256 * height // short)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - 224) / 2), round((high - 224) / 2)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def contenders():
    """Name, how a picture is held, and what is timed."""
    yield "pillow", Image.fromarray, pillow
    try:
        import torch
        from torchvision.transforms import v2
    except ImportError as error:
        print(f"torchvision is left out: {error}")
        return
    torch.set_num_threads(1)
    chain = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    yield "torchvision on Pillow", Image.fromarray, lambda it: np.asarray(chain(it))
    yield ("torchvision on u8 tensors",
           lambda it: torch.from_numpy(it).permute(2, 0, 1).contiguous(), chain)


def ours():
    """Medians of the Rust benchmark, by picture."""
    command = ["cargo", "bench", "--quiet", "--bench", "preprocess"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        size, layout, median, _ = line.split()
        yield (size, f"ghostwatch {layout}"), float(median)


def theirs(others):
    """The same of the others."""
    for width, height in SIZES:
        shape = (height, width, 3)
        arrays = [np.random.default_rng(it).integers(0, 256, shape, np.uint8)
                  for it in range(FRAMES)]
        for name, hold, run in others:
            frames = [hold(it) for it in arrays]
            times = []
            for it in range(3 * FRAMES):
                start = time.perf_counter()
                run(frames[it % FRAMES])
                times.append((time.perf_counter() - start) * 1e3)
            yield (f"{width}x{height}", name), statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    others, results = list(contenders()), {}
    for _ in range(rounds):
        for key, median in [*ours(), *theirs(others)]:
            results.setdefault(key, []).append(median)
    print(f"{'picture':<10} {'who':<26} {'ms/frame':>9}   (median of {rounds} rounds)")
    for (size, name), medians in sorted(results.items(), key=lambda it: int(it[0][0].split("x")[0])):
        print(f"{size:<10} {name:<26} {statistics.median(medians):>9.3f}")


if __name__ == "__main__":
    main()
