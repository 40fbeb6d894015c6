"""Runs the layers of the bench; started by scripts/bench, which says what there is to choose.

    L0  the network alone                       network.py, with workers network.rs and peers.py
    L1  preprocess alone                        preprocess.py and preprocess.rs
    L2  decode alone, to a fakesink             videos.py
    L3  file -> labels                          videos.py
    L4  live streams                            live.py

Contenders are measured in rounds, one after the other, and compared within a round: what slows the
machine down for a while slows them all. No one is timed whose answers are not PyTorch's.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import time

import live
import measure
import network
import report
import videos
from measure import BACKENDS, FOLDER, GHOSTWATCH, LIVE, PYTHON, WEIGHTS, Store

LAYERS = ["L0", "L1", "L2", "L3", "L4"]
QUICK_ROUNDS = 3
# Of the clips that are read as fast as they can be labelled.
FILE_SECONDS = 12


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    options.layers = options.layers.split(",")
    unknown = set(options.layers) - set(LAYERS)
    if unknown or options.rounds < 1:
        parser.error(f"unknown layers {sorted(unknown)}" if unknown else "--rounds is at least 1")
    if options.quick:
        options.layers, options.rounds = ["L0"], QUICK_ROUNDS
    options.seconds = 0.5 if options.quick else 1.0
    options.sizes = list(measure.SIZES)
    options.device = BACKENDS[LIVE]
    return options


def say(text):
    print(f"bench {time.strftime('%H:%M:%S')}: {text}", file=sys.stderr, flush=True)


def identity(options):
    """What must be the same for measured figures to be used again."""
    binary = hashlib.sha256()
    for path in (GHOSTWATCH, pathlib.Path(options.benches["network"])):
        binary.update(path.read_bytes())
    return {"binaries": binary.hexdigest(), "rounds": options.rounds, "quick": options.quick,
            "layers": options.layers, "backends": BACKENDS}


def preprocess(options, store):
    import preprocess

    for number in range(options.rounds):
        say(f"L1 round {number + 1}")
        store.take(f"L1 round {number}", lambda: preprocess.one_round(options.benches["preprocess"]))


def decode(options, store):
    for size in options.sizes:
        path, frames = measure.clip(size, 30, FILE_SECONDS)
        for number in range(options.rounds):
            say(f"L2 {size} round {number + 1}")

            def one(path=path, frames=frames):
                used, took = videos.decode(path)
                return {"core_ms": used / frames, "fps": frames / took}

            store.take(f"L2 {size} round {number}", one)


def files(options, store):
    """L3, and in each round the parts alone."""
    environment = measure.environment()
    for size in options.sizes:
        path, frames = measure.clip(size, 30, FILE_SECONDS)
        for number in range(options.rounds):
            say(f"L3 {size} round {number + 1}")
            store.take(f"L3 {size} round {number}", lambda path=path, frames=frames, size=size: one_file(
                options, size, path, frames, environment))


def one_file(options, size, path, frames, environment):
    """One round: everybody once, and the parts of each of our backends."""
    result, labels = {}, {}
    for name in videos.PEERS:
        result[name], labels[name] = videos.peer(name, path, PYTHON, WEIGHTS, FOLDER, environment)
    width, height = measure.SIZES[size]
    medians = {}
    for line in subprocess.run([options.benches["preprocess"]], check=True, capture_output=True,
                               text=True).stdout.splitlines():
        picture, layout, median, _ = line.split()
        medians[picture, layout] = float(median)
    parts = {"decode": videos.decode(path)[0] / frames, "preprocess": medians[f"{width}x{height}", "I420"]}
    for name, device in BACKENDS.items():
        worker = measure.ours(device, options.pictures, options.benches)
        worker.ask(f"load 8 fp32 {measure.CORES}")
        inference = measure.CORES * 1e3 / worker.run(options.seconds)["fps"]
        worker.close()
        result[name], labels[name] = videos.ours(path, GHOSTWATCH, WEIGHTS, device, environment)
        if len(labels[name]) != frames:
            raise RuntimeError(f"{name} labelled {len(labels[name])} of {frames} frames of {path}")
        bound = measure.CORES * 1e3 / (sum(parts.values()) + inference)
        result |= {f"{name}: inference core-ms": inference, f"{name}: bound": bound}
        loop = labels["Python loop"]
        same = sum(a == b for a, b in zip(loop, labels[name]))
        result[f"{name}: same first label as the Python loop"] = same / len(loop)
    return result | {f"{part} core-ms": it for part, it in parts.items()}


def main():
    options = arguments()
    FOLDER.mkdir(parents=True, exist_ok=True)
    options.benches = measure.benches()
    options.pictures = measure.pictures()
    begun = time.monotonic()
    store = Store(identity(options), options.fresh or options.quick)
    steps = {"L0": lambda: network.run(options, store, say), "L1": lambda: preprocess(options, store),
             "L2": lambda: decode(options, store), "L3": lambda: files(options, store),
             "L4": lambda: live.run(options, store, say)}
    for layer in options.layers:
        steps[layer]()
    print(report.table(store, options))
    failed = [name for name, it in store.values.items() if name.startswith("L0 gate")
              and not network.passes(it, name.split()[2]) and not it.get("failed")]
    if not options.quick:
        report.write(store, options)
        say(f"wrote benches/RESULTS.md after {time.monotonic() - begun:.0f} s")
    store.save(True)
    ours = [it for it in failed if it.split(maxsplit=3)[3].startswith(tuple(BACKENDS))]
    if ours:
        sys.exit(f"bench: other answers than PyTorch: {', '.join(ours)}")


if __name__ == "__main__":
    main()
