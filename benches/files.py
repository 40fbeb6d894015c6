"""L2 and L3 of the bench: decoding alone, and from a file to labels with the parts of each backend.

Values in the store: `L2 SIZE round K`, `L3 SIZE round K`. A name with a colon says more about a
contender: `NAME: failed` (the reason), `NAME: same` (part of the first labels that are those of the
Python loop), `NAME: compared` (of how many frames), `NAME: inference`, `NAME: bound`.
"""

import network
import preprocess
import videos
from measure import CORES, SIZES, Failed, clip, ours

FPS = 30
# The loop labels all frames in the first round, where all are compared, and these in the others.
LOOP_FRAMES = 150
INFERENCE_BATCH = 8


def decode(options, store, say):
    for index, size in enumerate(SIZES):
        path, frames = clip(size, FPS)
        for number in range(options.rounds):
            name = f"L2 {size} round {number}"
            if name not in store.values and number and options.clock.late("L2", (index + 1) / len(SIZES)):
                say(f"L2 {size}: the time is up after {number} rounds")
                break

            def one(path=path, frames=frames):
                used, took = videos.decode(path)
                return {"core_ms": used / frames, "fps": frames / took}

            say(name)
            store.take(name, one)


def run(options, store, say):
    """L3, and in each round the parts alone."""
    workers = {}
    try:
        for index, size in enumerate(SIZES):
            for number in range(options.rounds):
                name = f"L3 {size} round {number}"
                part = (index + 1) / len(SIZES)
                if name not in store.values and number and options.clock.late("L3", part):
                    say(f"L3 {size}: the time is up after {number} rounds")
                    break
                say(name)
                store.take(name, lambda: one_round(options, store, say, size, number, workers))
    finally:
        for it in workers.values():
            it.close()


def one_round(options, store, say, size, number, workers):
    """Everybody once, and the parts of each of our backends. Who has failed is not tried again."""
    path, frames = clip(size, FPS)
    loop_frames = options.frames if number == 0 else min(options.frames, LOOP_FRAMES)
    earlier = store.values.get(f"L3 {size} round 0", {})
    result, labels = {}, {}
    contenders = {it: (lambda it=it: videos.peer(it, path, loop_frames))
                  for it in (videos.LOOP, videos.PIPELINE)}
    contenders |= {name: (lambda device=device: videos.ours(path, frames, options.benches["ghostwatch"], device))
                   for name, device in options.backends.items()}
    first = number % len(contenders)
    turn = list(contenders)
    for name in turn[first:] + turn[:first]:
        if f"{name}: failed" in earlier:
            result[f"{name}: failed"] = earlier[f"{name}: failed"]
            continue
        try:
            result[name], labels[name] = contenders[name]()
        except Failed as error:
            result[f"{name}: failed"] = str(error)
            say(f"L3 {size}: {name} did not run: {error}")
    wanted = labels.get(videos.LOOP, [])
    for name, found in labels.items():
        if name != videos.LOOP and wanted:
            result[f"{name}: same"] = sum(a == b for a, b in zip(wanted, found)) / len(wanted)
            result[f"{name}: compared"] = len(wanted)
    return result | parts(options, size, path, frames, workers)


def parts(options, size, path, frames, workers):
    """Decode, preprocess and inference alone, in milliseconds of one core a frame, and the frames a
    second that there would be if nothing else cost anything."""
    width, height = SIZES[size]
    picture = f"{width}x{height} I420"
    (_, prepared), = preprocess.ours(options.benches["preprocess"], picture)
    result = {"decode core-ms": videos.decode(path)[0] / frames, "preprocess core-ms": prepared}
    for name, device in options.backends.items():
        if name not in workers:
            workers[name] = ours(device, options.pictures, options.benches)
            workers[name].ask(f"load {INFERENCE_BATCH} fp32 {CORES}")
        inference = CORES * 1e3 / workers[name].run(options.seconds)["fps"]
        result[f"{name}: inference"] = inference
        result[f"{name}: bound"] = CORES * 1e3 / (sum(result[it] for it in (
            "decode core-ms", "preprocess core-ms")) + inference)
    return result


def contender(name):
    """Whether a name in a round is that of a contender."""
    return ":" not in name and "core-ms" not in name


def gated(store, name):
    """Why a row does not count: its network has not passed the gate of L0. `None` if it has, or if
    L0 was not measured in this run."""
    rows = {videos.LOOP: network.REFERENCE, videos.PIPELINE: "OpenVINO, throughput"}
    row = rows.get(name, f"{name}, {CORES} lane{'s' if 1 < CORES else ''}")
    known = f"L0 gate fp32 {row}" in store.values
    return "its network failed the gate" if known and not network.passed(store, "fp32", row) else None
