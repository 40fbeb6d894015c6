"""Runs the layers of the bench; started by scripts/bench, which says what there is to choose.

    L0  the network alone                       network.py, with workers network.rs and peers.py
    L1  preprocess alone                        preprocess.py and preprocess.rs
    L2  decode alone, to a fakesink             files.py, videos.py
    L3  file -> labels                          files.py, videos.py
    L4  live streams                            live.py

Contenders are measured in rounds, one after the other, and compared within a round: what slows the
machine down for a while slows them all. No one is timed whose answers are not PyTorch's.
"""

import argparse
import hashlib
import pathlib
import shlex
import shutil
import sys
import time

import files
import live
import measure
import network
import preprocess
import report
from measure import FOLDER, MADE, SIZES, Clock, Failed, Others, Store

LAYERS = ["L0", "L1", "L2", "L3", "L4"]
QUICK_ROUNDS = 3
TRY_CARGO = "--profile dev"
TRY_PATIENCE = 8


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--try", action="store_true", dest="trying")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=27)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--cargo", default="", metavar="ARGUMENTS")
    options = parser.parse_args()
    options.layers = options.layers.split(",")
    unknown = set(options.layers) - set(LAYERS)
    if unknown or options.rounds < 1:
        parser.error(f"unknown layers {sorted(unknown)}" if unknown else "--rounds is at least 1")
    if options.quick:
        options.layers, options.rounds = ["L0"], QUICK_ROUNDS
    options.batches = network.QUICK_BATCHES if options.quick or options.trying else network.BATCHES
    options.seconds = 0.5 if options.quick or options.trying else 0.7
    options.rates, options.growth, options.trials = live.RATES, live.GROWTH_COUNTS, live.TRIALS_MAX
    options.frames = measure.CLIP_SECONDS * files.FPS
    if options.trying:
        options.rounds, options.rates, options.growth, options.trials, options.frames = 1, [5], [1, 2], 2, 60
        options.minutes = 600
        measure.patience = TRY_PATIENCE
    return options


def say(text):
    """A line with the time, and with the minutes since the measuring began."""
    since = f" +{begun.elapsed() / 60:.1f} min" if begun else ""
    print(f"bench {time.strftime('%H:%M:%S')}{since}: {text}", file=sys.stderr, flush=True)


begun = None


def prepare(options):
    """What is built and made before anything is measured."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    MADE.mkdir(parents=True, exist_ok=True)
    profile = shlex.split(TRY_CARGO) if options.trying else []
    say("builds what is missing")
    options.benches = measure.build([*profile, *shlex.split(options.cargo)])
    say("makes the clips and exports the network, where they are missing")
    options.pictures = measure.pictures()
    for size in SIZES:
        for fps in {*options.rates, files.FPS}:
            measure.clip(size, fps)
    network.export(sorted({*options.batches, network.GATE_BATCH}), say)
    options.backends = measure.backends(options.pictures, options.benches, say)
    options.live = list(options.backends)[-1]


def estimates(options):
    """Seconds that each layer takes on two quiet AVX2 cores, from what its steps took there."""
    rounds, batches, backends = options.rounds, len(options.batches), len(options.backends)
    rows = (len(network.PEERS) if not options.quick else len(network.QUICK)) + 2 * backends
    compiled = 0 if options.quick else 18 * batches
    return {it: seconds for it, seconds in {
        "L0": compiled + rows * (5 + batches * (1.5 + rounds * (options.seconds + 0.5))) + 6,
        "L1": 6 + 7 * rounds,
        "L2": 7 * rounds,
        "L3": len(SIZES) * (20 + rounds * (19 + 7 * backends)),
        "L4": 11 * (len(SIZES) * len(options.rates) * min(4, options.trials) + len(options.growth)),
    }.items() if it in options.layers}


def plan(options, store):
    expected = estimates(options)
    say(f"{measure.CORES} cores, {options.rounds} rounds, backends: {', '.join(options.backends)}; "
        f"about {sum(expected.values()) / 60:.0f} min on a quiet machine, "
        f"no round begins after {options.minutes:.0f} min")
    for layer, seconds in expected.items():
        say(f"  {layer} {report.TABLES[layer][0].lower()}: about {seconds / 60:.1f} min")
    if store.resumed:
        say(f"goes on where a bench was broken off: {store.resumed} figures are there")
    load = pathlib.Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    if 0.5 < float(load):
        say(f"the load is {load}: this machine has something else to do, so read ratios only")
    return Clock(options.minutes, expected)


def identity(options):
    """What must be the same for measured figures to be used again."""
    binaries = hashlib.sha256()
    for name in ("ghostwatch", "network", "preprocess"):
        binaries.update(pathlib.Path(options.benches[name]).read_bytes())
    return {"binaries": binaries.hexdigest(), "rounds": options.rounds, "quick": options.quick,
            "try": options.trying, "backends": options.backends}


STEPS = {"L0": network.run, "L1": preprocess.rounds, "L2": files.decode, "L3": files.run, "L4": live.run}


def layer(name, options, store):
    """Measures a layer; what goes wrong ends that layer only."""
    others, about = Others(), {"date": time.strftime("%Y-%m-%d")}
    try:
        STEPS[name](options, store, say)
    except (Failed, OSError, ValueError, KeyError, AssertionError) as error:
        about["failed"] = f"{type(error).__name__}: {error}"
        say(f"{name} did not run to its end: {about['failed']}")
    store.put(f"{name} machine", about | {"others": others.share()})


def main():
    global begun
    options = arguments()
    prepare(options)
    if options.prepare:
        return
    path = FOLDER / ("quick.jsonl" if options.quick else "try.jsonl" if options.trying else "rounds.jsonl")
    store = Store(path, identity(options), options.fresh or options.quick)
    begun = options.clock = plan(options, store)
    for name in options.layers:
        layer(name, options, store)
    print(report.table(store, options))
    failed = [name for name, it in store.values.items() if name.startswith("L0 gate")
              and not network.passes(it, name.split()[2]) and not it.get("failed")]
    if not options.quick:
        results = report.RESULTS
        if options.trying:
            results = FOLDER / "try" / "RESULTS.md"
            results.parent.mkdir(exist_ok=True)
            shutil.copy(report.RESULTS, results)
        report.write(store, options, results)
        say(f"wrote {results.relative_to(measure.ROOT)}")
    store.done(options.layers)
    ours = [it for it in failed if it.split(maxsplit=3)[3].startswith(tuple(measure.BACKENDS))]
    if ours:
        sys.exit(f"bench: other answers than PyTorch: {', '.join(ours)}")


if __name__ == "__main__":
    main()
