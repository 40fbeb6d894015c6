"""L0 of the bench: the network alone. First the gate, then rounds.

Values in the store: `L0 gate PRECISION NAME`, `L0 PRECISION batch N round K` (by contender, frames a
second and core milliseconds; what failed has its reason instead), `L0 one core round K`.
"""

import concurrent.futures
import os
import pathlib

import numpy as np

from measure import CORES, FOLDER, PYTHON, WEIGHTS, Failed, Worker, collected, ours, run as process

BATCHES = [1, 2, 4, 8, 16, 32]
QUICK_BATCHES = [1, 8]
REFERENCE = "torch eager, 1 lane"
COMPILED = "torch.compile"
GATE_BATCH = 8
GATE_PICTURES = 500

# Name in the results, name in peers.py, lanes: with one lane a peer has all cores for one batch,
# with more it computes several batches at once. OpenVINO decides that by its hint.
PEERS = [
    (REFERENCE, "torch-eager", 1),
    (f"torch eager, {CORES} lanes", "torch-eager", CORES),
    (COMPILED, "torch-compile", 1),
    ("TorchScript, 1 lane", "torch-script", 1),
    (f"TorchScript, {CORES} lanes", "torch-script", CORES),
    ("ONNX Runtime, 1 lane", "onnxruntime", 1),
    (f"ONNX Runtime, {CORES} lanes", "onnxruntime", CORES),
    ("OpenVINO, latency", "openvino-latency", 1),
    ("OpenVINO, throughput", "openvino-throughput", 1),
]
# Of each the best variant counts.
FAMILIES = ["torch eager", COMPILED, "TorchScript", "ONNX Runtime", "OpenVINO"]
QUICK = {REFERENCE, "OpenVINO, latency", "OpenVINO, throughput"}
# On one core, batch 1: who is the first with an answer.
ONE_CORE = ["OpenVINO, latency"]


def contenders(options, cores=None):
    """Name, how to start it, lanes."""
    for name, peer, lanes in PEERS:
        if not options.quick or name in QUICK:
            command = (PYTHON, pathlib.Path(__file__).parent / "peers.py", peer, WEIGHTS, options.pictures,
                       FOLDER)
            yield name, lambda command=command: Worker(*command, cores=cores), lanes
    for name, device in options.backends.items():
        for lanes in dict.fromkeys((1, CORES)):
            label = f"{name}, {lanes} lane{'s' if 1 < lanes else ''}"
            yield label, lambda device=device: ours(device, options.pictures, options.benches, cores), lanes


def export(batches, say):
    """The network as ONNX; without it OpenVINO and ONNX Runtime do not run."""
    missing = [it for it in batches if not (FOLDER / f"network-{it}.onnx").exists()]
    if missing:
        try:
            process([PYTHON, pathlib.Path(__file__).parent / "torch_network.py", WEIGHTS, FOLDER, *missing])
        except Failed as error:
            say(f"the network was not exported to ONNX: {error}")


def answers(worker, precision, lanes):
    worker.ask(f"load {GATE_BATCH} {precision} {lanes}")
    path = FOLDER / "answer.f32"
    count = int(worker.ask(f"answer {path}"))
    return np.fromfile(path, np.float32).reshape(count, -1)


def compare(found, want):
    """How often the first labels agree, and the largest difference in parts of the largest logit."""
    return {"pictures": len(want), "top1": float((found.argmax(1) == want.argmax(1)).mean()),
            "error": float(np.abs(found - want).max() / np.abs(want).max())}


def passes(result, precision):
    if result.get("failed") or result["pictures"] < GATE_PICTURES:
        return False
    if precision == "fp32":
        return result["top1"] == 1.0 and result["error"] <= 1e-5
    return 0.995 <= result["top1"]


def passed(store, precision, name):
    result = store.values.get(f"L0 gate {precision} {name}")
    return result is not None and passes(result, precision)


def has_bf16():
    """Whether the processor multiplies bf16; without that all would only emulate it."""
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "avx512_bf16" in text or "amx_bf16" in text


def precisions():
    return ["fp32", "bf16"] if has_bf16() else ["fp32"]


class Workers:
    """Started when they are needed, and again when they have ended."""

    def __init__(self):
        self.started = {}

    def get(self, name, start, precision, batch):
        # A second compilation in one process ended with a segmentation fault (torch 2.11), and one
        # takes half a minute: a process for each, which keeps it.
        key = (name, precision, batch) if name == COMPILED else name
        if key not in self.started or not self.started[key].alive:
            self.started[key] = start()
        return self.started[key]

    def close(self, keys=None):
        for it in list(self.started) if keys is None else keys:
            if it in self.started:
                self.started.pop(it).close()


def side_by_side(work, items):
    """One thread of ours for each core: what is loaded is not timed."""
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(work, items))


def run(options, store, say):
    """Measures what is missing in `store`."""
    listed, workers = list(contenders(options)), Workers()
    groups = [(precision, batch) for precision in precisions() for batch in options.batches]
    try:
        compiled(listed, groups, workers, options, store, say)
        # All gates before anything is timed.
        for precision in precisions():
            gates(precision, listed, workers, store, say)
        for index, (precision, batch) in enumerate(groups):
            part = (index + 2) / (len(groups) + 2)
            group(precision, batch, part, [it for it in listed if passed(store, precision, it[0])],
                  workers, options, store, say)
            workers.close([(COMPILED, precision, batch)])
    finally:
        workers.close()
    if not options.quick:
        one_core(options, store, say)


def finished(store, prefix, rounds):
    return all(f"{prefix} round {it}" in store.values for it in range(rounds))


def compiled(listed, groups, workers, options, store, say):
    """Compiles for all batch sizes that are not measured yet."""
    start = next((it[1] for it in listed if it[0] == COMPILED), None)
    wanted = [it for it in groups if not finished(store, at(*it), options.rounds)]
    if start is None or not wanted:
        return
    say(f"L0: torch.compile gets ready for {len(wanted)} batch sizes")

    def one(it):
        precision, batch = it
        try:
            workers.get(COMPILED, start, precision, batch).ask(f"load {batch} {precision} 1")
        except Failed as error:
            say(f"{at(precision, batch)}: {COMPILED}: {error}")

    side_by_side(one, wanted)


def gates(precision, listed, workers, store, say):
    """Everybody's answers beside PyTorch's."""
    reference = None
    for name, start, lanes in listed:
        def gate():
            nonlocal reference
            if reference is None:
                reference = answers(workers.get(REFERENCE, listed[0][1], "fp32", GATE_BATCH), "fp32", 1)
            say(f"L0 gate {precision}: {name}")
            try:
                return compare(answers(workers.get(name, start, precision, GATE_BATCH), precision, lanes),
                               reference)
            except Failed as error:
                return {"failed": str(error)}

        result = store.take(f"L0 gate {precision} {name}", gate)
        if not passes(result, precision):
            say(f"L0 {precision}: {name} is left out: {result}")


def group(precision, batch, part, listed, workers, options, store, say):
    """All rounds of one batch size."""
    prefix = at(precision, batch)
    if finished(store, prefix, options.rounds):
        return
    say(f"{prefix}: {len(listed)} contenders get ready")
    failed, ready = {}, {}

    def load(it):
        name, start, lanes = it
        try:
            worker = workers.get(name, start, precision, batch)
            worker.ask(f"load {batch} {precision} {lanes}")
            ready[name] = worker
        except Failed as error:
            failed[name] = str(error)
            say(f"{prefix}: {name} is left out: {error}")

    side_by_side(load, listed)
    turn = [name for name, _, _ in listed if name in ready]
    rounds(prefix, turn, ready, failed, part, options, store, say)


def rounds(prefix, ready, workers, failed, part, options, store, say):
    """Everybody in turn, round after round; whoever fails is left out from there on."""
    for number in range(options.rounds):
        name = f"{prefix} round {number}"
        if name not in store.values and number and options.clock.late("L0", part):
            say(f"{prefix}: the time is up after {number} rounds")
            return
        # Whoever comes first in one round comes last in another.
        first = number % max(1, len(ready))

        def one(turn=ready[first:] + ready[:first]):
            result = {}
            for it in turn:
                if it not in failed:
                    try:
                        result[it] = workers[it].run(options.seconds)
                    except Failed as error:
                        failed[it] = str(error)
                        say(f"{prefix}: {it} is left out: {error}")
            return result | {it: {"failed": reason} for it, reason in failed.items()}

        store.take(name, one)
    say(f"{prefix}: {options.rounds} rounds done")


def one_core(options, store, say):
    """Batch 1 on one core."""
    if finished(store, "L0 one core", options.rounds):
        return
    wanted = [*ONE_CORE, *(f"{it}, 1 lane" for it in options.backends)]
    workers, failed = {}, {}
    cores = {max(os.sched_getaffinity(0))}
    try:
        for name, start, lanes in contenders(options, cores):
            if name in wanted and passed(store, "fp32", name):
                workers[name] = start()
                try:
                    workers[name].ask(f"load 1 fp32 {lanes}")
                except Failed as error:
                    failed[name] = str(error)
        rounds("L0 one core", list(workers), workers, failed, 1.0, options, store, say)
    finally:
        for it in workers.values():
            it.close()


def figures(store, prefix, what="fps"):
    """What was measured, by contender, one dictionary a round."""
    return [{name: it[what] for name, it in one.items() if what in it} for one in collected(store, prefix)]


def at(precision, batch):
    return f"L0 {precision} batch {batch}"
