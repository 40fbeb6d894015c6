"""L1 of the bench: preprocess beside Pillow, torchvision and OpenCV, one core each.

    target/peers/bin/python benches/preprocess.py [--rounds N]

Rounds alternate between ghostwatch (`benches/preprocess.rs`) and the others, and the median of the
rounds' medians is printed, so that a busy machine slows all of them down. Lines with I420 start from
a decoder's planes; Pillow and torchvision have no conversion of colours from planes, so with I420
OpenCV does that for them, and without it they start from RGB and have that for nothing.

The bench runs it as a worker (`preprocess.py worker EXECUTABLE`) that answers the order `round`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import measure

SIZES = [(1280, 720), (1920, 1080)]
FRAMES = 8


def scaled(width, height):
    short = min(width, height)
    return 256 * width // short, 256 * height // short


def contenders():
    """Name, how a picture is held, and what is timed."""
    import cv2
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    chain = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])

    def pillow(image):
        """Resize(256), CenterCrop(224) as torchvision does them, without its calls."""
        wide, high = scaled(*image.size)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = round((wide - 224) / 2), round((high - 224) / 2)
        return np.asarray(image.crop((left, top, left + 224, top + 224)))

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

    yield "Pillow", Image.fromarray, pillow
    yield ("Pillow I420", as_planes,
           lambda it: pillow(Image.fromarray(cv2.cvtColor(it, cv2.COLOR_YUV2RGB_I420))))
    yield "OpenCV I420", as_planes, opencv
    yield "torchvision on Pillow", Image.fromarray, lambda it: np.asarray(chain(it))
    yield ("torchvision on u8 tensors",
           lambda it: torch.from_numpy(it).permute(2, 0, 1).contiguous(), chain)


def ours(executable, *lines):
    """Medians of the Rust benchmark, by picture and layout; all, or those that begin like that."""
    for line in measure.run([executable, *lines]).splitlines():
        size, layout, median, _ = line.split()
        yield f"{size} ghostwatch {layout.upper()}", float(median)


def theirs():
    """The same of the others."""
    import numpy as np

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
    try:
        sizes = [f"{width}x{height}" for width, height in SIZES]
        return {**dict(ours(executable, *sizes)), **dict(theirs())}
    finally:
        os.sched_setaffinity(0, before)


def rounds(options, store, say):
    """L1: measures what is missing in `store`."""
    worker = measure.Worker(measure.PYTHON, __file__, "worker", options.benches["preprocess"])
    try:
        for number in range(options.rounds):
            name = f"L1 round {number}"
            if name not in store.values and number and options.clock.late("L1", 1.0):
                say(f"L1: the time is up after {number} rounds")
                break
            say(name)
            store.take(name, lambda: json.loads(worker.ask("round")))
    finally:
        worker.close()


def obey(executable):
    for _ in sys.stdin:
        try:
            print("ok", json.dumps(one_round(executable)), flush=True)
        except (ImportError, OSError, measure.Failed, subprocess.SubprocessError) as error:
            print("error", " ".join(str(error).split()), flush=True)


def main():
    if sys.argv[1:2] == ["worker"]:
        obey(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    number = parser.parse_args().rounds
    measure.FOLDER.mkdir(parents=True, exist_ok=True)
    executable = measure.build([])["preprocess"]
    results = [one_round(executable) for _ in range(number)]
    print(f"{'picture and who':<40} {'ms/frame':>9}   (median of {number} rounds)")
    for name in results[0]:
        print(f"{name:<40} {statistics.median(it[name] for it in results):>9.3f}")


if __name__ == "__main__":
    main()
