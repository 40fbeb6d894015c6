"""L0 of the bench: the network alone. First the gate, then rounds."""

import pathlib

import numpy as np

from measure import BACKENDS, CORES, FOLDER, PYTHON, WEIGHTS, Failed, Worker, ours

BATCHES = [1, 2, 4, 8, 16, 32]
REFERENCE = "torch eager, 1 lane"
GATE_BATCH = 8

# Name in the results, name in peers.py, lanes: with one lane a peer has both cores for one batch,
# with two it computes two batches at once. OpenVINO decides that by its hint.
PEERS = [
    (REFERENCE, "torch-eager", 1),
    (f"torch eager, {CORES} lanes", "torch-eager", CORES),
    ("torch.compile", "torch-compile", 1),
    ("TorchScript, 1 lane", "torch-script", 1),
    (f"TorchScript, {CORES} lanes", "torch-script", CORES),
    ("ONNX Runtime, 1 lane", "onnxruntime", 1),
    (f"ONNX Runtime, {CORES} lanes", "onnxruntime", CORES),
    ("OpenVINO, latency", "openvino-latency", 1),
    ("OpenVINO, throughput", "openvino-throughput", 1),
]
QUICK = {REFERENCE, "OpenVINO, latency", "OpenVINO, throughput"}


def contenders(quick, pictures, benches):
    """Name, how to start it, lanes."""
    for name, peer, lanes in PEERS:
        if not quick or name in QUICK:
            command = (PYTHON, pathlib.Path(__file__).parent / "peers.py", peer, WEIGHTS, pictures)
            yield name, lambda command=command: Worker(*command), lanes
    for name, device in BACKENDS.items():
        for lanes in dict.fromkeys((1, CORES)):
            label = f"{name}, {lanes} lane{'s' if 1 < lanes else ''}"
            yield label, lambda device=device: ours(device, pictures, benches), lanes


def answers(worker, precision, lanes):
    worker.ask(f"load {GATE_BATCH} {precision} {lanes}")
    path = FOLDER / "answer.f32"
    count = int(worker.ask(f"answer {path}")[0])
    return np.fromfile(path, np.float32).reshape(count, -1)


def compare(found, want):
    """How often the first labels agree, and the largest difference in parts of the largest logit."""
    return {"pictures": len(want), "top1": float((found.argmax(1) == want.argmax(1)).mean()),
            "error": float(np.abs(found - want).max() / np.abs(want).max())}


def passes(result, precision):
    if result.get("failed") or result["pictures"] < 500:
        return False
    if precision == "fp32":
        return result["top1"] == 1.0 and result["error"] <= 1e-5
    return 0.995 <= result["top1"]


def has_bf16():
    """Whether the processor multiplies bf16; without that all would only emulate it."""
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "avx512_bf16" in text or "amx_bf16" in text


def precisions():
    return ["fp32", "bf16"] if has_bf16() else ["fp32"]


def run(options, store, say):
    """Measures what is missing in `store`."""
    workers, batches = {}, [1, 8] if options.quick else BATCHES
    try:
        for precision in precisions():
            group(precision, batches, workers, options, store, say)
    finally:
        for it in workers.values():
            it.close()


def group(precision, batches, workers, options, store, say):
    """One precision: the gate, then all batch sizes."""
    listed = list(contenders(options.quick, options.pictures, options.benches))

    def worker(name, start):
        if name not in workers:
            workers[name] = start()
        return workers[name]

    reference = None
    for name, start, lanes in listed:
        def gate():
            nonlocal reference
            if reference is None:
                reference = answers(worker(REFERENCE, listed[0][1]), "fp32", 1)
            try:
                return compare(answers(worker(name, start), precision, lanes), reference)
            except Failed as error:
                return {"failed": str(error)}

        result = store.take(f"L0 gate {precision} {name}", gate)
        if not passes(result, precision):
            say(f"L0 {precision}: {name} is left out: {result}")
    listed = [it for it in listed if passes(store.values[f"L0 gate {precision} {it[0]}"], precision)]
    for batch in batches:
        keys = [f"L0 {precision} batch {batch} round {it}" for it in range(options.rounds)]
        if all(it in store.values for it in keys):
            continue
        say(f"L0 {precision}, batch {batch}")
        ready = []
        for name, start, lanes in listed:
            try:
                worker(name, start).ask(f"load {batch} {precision} {lanes}")
                ready.append(name)
            except Failed as error:
                say(f"L0 {precision}, batch {batch}: {name} is left out: {error}")
        for number, key in enumerate(keys):
            # Whoever comes first in one round comes last in another.
            first = number % len(ready)
            turn = ready[first:] + ready[:first]
            store.take(key, lambda turn=turn: {it: workers[it].run(options.seconds) for it in turn})


def rounds(store, precision, batch, what="fps"):
    """What was measured, by contender, one dictionary a round."""
    found, number = [], 0
    while f"L0 {precision} batch {batch} round {number}" in store.values:
        one = store.values[f"L0 {precision} batch {batch} round {number}"]
        found.append({name: it[what] for name, it in one.items()})
        number += 1
    return found
