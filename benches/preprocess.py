"""Preprocess beside Pillow, torchvision and OpenCV, in one run, one core each.

    target/peers/bin/python benches/preprocess.py [--rounds N]

Rounds alternate between ghostwatch (`benches/preprocess.rs`) and the others, and the median of the
rounds' medians is printed, so that a busy machine slows all of them down. Lines with I420 start from
a decoder's planes; Pillow and torchvision have no conversion of colours from planes, so with I420
OpenCV does that for them, and without it they start from RGB and have that for nothing.
"""

import argparse
import os
import statistics
import subprocess
import time

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

import measure

SIZES = [(1280, 720), (1920, 1080)]
FRAMES = 8


def pillow(image):
    """Resize(256), CenterCrop(224) as torchvision does them, without its calls."""
    width, height = image.size
    wide, high = scaled(width, height)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - 224) / 2), round((high - 224) / 2)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def scaled(width, height):
    short = min(width, height)
    return 256 * width // short, 256 * height // short


def opencv(planes):
    """The same in OpenCV; INTER_AREA is the one that it advises for making pictures smaller."""
    image = cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_I420)
    height, width, _ = image.shape
    wide, high = scaled(width, height)
    image = cv2.resize(image, (wide, high), interpolation=cv2.INTER_AREA)
    left, top = round((wide - 224) / 2), round((high - 224) / 2)
    return np.ascontiguousarray(image[top:top + 224, left:left + 224])


def as_planes(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420)


def contenders():
    """Name, how a picture is held, and what is timed."""
    chain = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    yield "Pillow", Image.fromarray, pillow
    yield ("Pillow I420", as_planes,
           lambda it: pillow(Image.fromarray(cv2.cvtColor(it, cv2.COLOR_YUV2RGB_I420))))
    yield "OpenCV I420", as_planes, opencv
    yield "torchvision on Pillow", Image.fromarray, lambda it: np.asarray(chain(it))
    yield ("torchvision on u8 tensors",
           lambda it: torch.from_numpy(it).permute(2, 0, 1).contiguous(), chain)


def ours(executable):
    """Medians of the Rust benchmark, by picture and contender."""
    text = subprocess.run([executable], check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        size, layout, median, _ = line.split()
        yield f"{size} ghostwatch {layout.upper()}", float(median)


def theirs():
    """The same of the others."""
    for width, height in SIZES:
        shape = (height, width, 3)
        arrays = [np.random.default_rng(it).integers(0, 256, shape, np.uint8)
                  for it in range(FRAMES)]
        for name, hold, run in contenders():
            frames = [hold(it) for it in arrays]
            times = []
            for it in range(3 * FRAMES):
                start = time.perf_counter()
                run(frames[it % FRAMES])
                times.append((time.perf_counter() - start) * 1e3)
            yield f"{width}x{height} {name}", statistics.median(times)


def one_round(executable):
    """Milliseconds a frame on one core, by picture and contender."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        return {**dict(ours(executable)), **dict(theirs())}
    finally:
        os.sched_setaffinity(0, before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    executable = measure.benches()["preprocess"]
    results = [one_round(executable) for _ in range(rounds)]
    print(f"{'picture and who':<40} {'ms/frame':>9}   (median of {rounds} rounds)")
    for name in results[0]:
        print(f"{name:<40} {statistics.median(it[name] for it in results):>9.3f}")


if __name__ == "__main__":
    main()
