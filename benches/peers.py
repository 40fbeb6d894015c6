"""Peers of the network alone, as workers that take the same orders as `benches/network.rs`.

    peers.py NAME WEIGHTS PICTURES EXPORTED

All compute the same from the same bytes: normalisation and network in one model, timm's
ghostnet_100 with the tensors of WEIGHTS; EXPORTED is the folder in which `torch_network.py` has
written it as ONNX, one file for each batch size. `lanes` is how many run beside each other; they
share the cores, or one lane has them all.
"""

import os
import pathlib
import sys
import threading
import time
import types

import numpy as np

SIDE = 224
CORES = len(os.sched_getaffinity(0))


class Torch:
    """PyTorch, one model for all lanes."""

    def load(self, files, batch, precision, lanes):
        import torch

        import torch_network

        self.torch, self.threads = torch, max(1, CORES // lanes)
        torch.set_num_threads(self.threads)
        with torch.no_grad():
            self.model = self.prepare(torch_network.network(files.weights, precision), batch)

    def prepare(self, model, batch):
        return model

    def lane(self):
        # OpenMP keeps the number per thread.
        self.torch.set_num_threads(self.threads)

        def run(pixels):
            with self.torch.inference_mode():
                return self.model(self.torch.from_numpy(pixels)).numpy()

        return run


class Script(Torch):
    """Traced and frozen: BatchNorm is folded."""

    def prepare(self, model, batch):
        example = self.torch.zeros((batch, SIDE, SIDE, 3), dtype=self.torch.uint8)
        # The gate compares the answers, so the trace need not be run three times to do it.
        return self.torch.jit.freeze(self.torch.jit.trace(model, example, check_trace=False))


class Compiled(Torch):
    """torch.compile for each batch size, with the weights as constants."""

    def __init__(self):
        self.compiled = {}

    def prepare(self, model, batch):
        # Compiling takes half a minute: the gate's batch size is needed twice.
        return self.compiled.setdefault((model.kind, batch), self.compile(model))

    def compile(self, model):
        import torch._dynamo as dynamo
        import torch._inductor.config as inductor

        stand_in()
        inductor.freezing = True
        dynamo.config.recompile_limit = 32
        # It would compute without compiling, and say nothing.
        dynamo.config.fail_on_recompile_limit_hit = True
        return self.torch.compile(model, dynamic=False)


def stand_in():
    """torch.compile asks whether values are of a class of PyTorch's own tests, which
    `torch_without_cuda.py` leaves out. No value is."""
    for name in ("torch.testing._internal.distributed", "torch.testing._internal.distributed.fake_pg"):
        sys.modules.setdefault(name, types.ModuleType(name))
    fake = sys.modules["torch.testing._internal.distributed.fake_pg"]
    if not hasattr(fake, "FakeProcessGroup"):
        fake.FakeProcessGroup = type("FakeProcessGroup", (), {})


class Onnx:
    """ONNX Runtime, one session per lane."""

    def load(self, files, batch, precision, lanes):
        import onnxruntime

        if precision != "fp32":
            raise ValueError("the CPU provider has no bf16 convolution")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, CORES // lanes)
        self.sessions = [
            onnxruntime.InferenceSession(files.exported(batch), options, providers=["CPUExecutionProvider"])
            for _ in range(lanes)]
        self.taken = 0

    def lane(self):
        session = self.sessions[self.taken % len(self.sessions)]
        self.taken += 1
        name = session.get_inputs()[0].name
        return lambda pixels: session.run(None, {name: pixels})[0]


class Openvino:
    """OpenVINO with one of its two hints. It decides itself what runs beside what."""

    def __init__(self, hint):
        self.hint = hint

    def load(self, files, batch, precision, _lanes):
        import openvino

        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this CPU has no bf16 for OpenVINO")
        self.model = core.compile_model(core.read_model(files.exported(batch)), "CPU", {
            "PERFORMANCE_HINT": self.hint,
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]})

    def lane(self):
        request = self.model.create_infer_request()
        return lambda pixels: request.infer({0: pixels}, share_inputs=True)[0]

    def run_all(self, batches, seconds):
        """As many requests at once as it asks for."""
        import openvino

        queue = openvino.AsyncInferQueue(self.model)
        done = 0
        for _ in range(len(queue)):
            queue.start_async({0: next(batches)}, share_inputs=True)
        queue.wait_all()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch = next(batches)
            queue.start_async({0: batch}, share_inputs=True)
            done += len(batch)
        queue.wait_all()
        return done, time.perf_counter() - start


PEERS = {
    "torch-eager": Torch, "torch-script": Script, "torch-compile": Compiled, "onnxruntime": Onnx,
    "openvino-latency": lambda: Openvino("LATENCY"),
    "openvino-throughput": lambda: Openvino("THROUGHPUT"),
}


class Files:
    """Where the network is."""

    def __init__(self, weights, folder):
        self.weights, self.folder = weights, pathlib.Path(folder)

    def exported(self, batch):
        path = self.folder / f"network-{batch}.onnx"
        if not path.exists():
            raise FileNotFoundError(f"the network was not exported to {path.name}")
        return str(path)


def forever(pictures, batch):
    """Batches, over and over; a peer compiled for a size gets no other."""
    while True:
        for at in range(0, len(pictures) - batch + 1, batch):
            yield pictures[at:at + batch]


class Worker:
    def __init__(self, peer, files, pictures):
        self.peer, self.files = peer, files
        self.pictures = np.fromfile(pictures, np.uint8).reshape(-1, SIDE, SIDE, 3)

    def load(self, batch, precision, lanes):
        self.batch, self.lanes = int(batch), int(lanes)
        self.peer.load(self.files, self.batch, precision, self.lanes)
        # TorchScript compiles at its first calls.
        return self.run("0", warm=3)

    def answer(self, file):
        starts = range(0, len(self.pictures), self.batch)
        rows = [None] * len(starts)

        def one(number):
            lane = self.peer.lane()
            for index in range(number, len(starts), self.lanes):
                part = self.pictures[starts[index]:starts[index] + self.batch]
                rest = np.zeros_like(self.pictures[:self.batch - len(part)])
                rows[index] = np.array(lane(np.concatenate([part, rest]))[:len(part)], np.float32)

        self.on_lanes(one)
        np.concatenate(rows).tofile(file)
        return str(len(self.pictures))

    def run(self, seconds, warm=1):
        seconds = float(seconds)
        if hasattr(self.peer, "run_all") and self.peer.hint == "THROUGHPUT":
            done, took = self.peer.run_all(forever(self.pictures, self.batch), seconds)
            return f"{done} {took:.6f}"
        together = threading.Barrier(self.lanes)

        def one(_number):
            try:
                lane, batches = self.peer.lane(), forever(self.pictures, self.batch)
                for _ in range(warm):
                    lane(next(batches))
            except BaseException:
                together.abort()
                raise
            together.wait()
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                done += len(lane(next(batches)))
            return done, time.perf_counter() - start

        results = self.on_lanes(one)
        return f"{sum(it[0] for it in results)} {max(it[1] for it in results):.6f}"

    def on_lanes(self, work):
        """What `work` gives on each lane's thread; the first reason if one fails."""
        results, reasons = [], []

        def one(number):
            try:
                results.append(work(number))
            except Exception as error:
                reasons.append(error)

        threads = [threading.Thread(target=one, args=(it,)) for it in range(self.lanes)]
        for it in threads:
            it.start()
        for it in threads:
            it.join()
        # The other lanes only say that one of them did not come.
        reasons.sort(key=lambda it: isinstance(it, threading.BrokenBarrierError))
        if reasons:
            raise reasons[0]
        return results


def main():
    name, weights, pictures, exported = sys.argv[1:]
    worker = Worker(PEERS[name](), Files(weights, exported), pictures)
    # Libraries write to standard output; the answers must be alone there.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        order, *arguments = line.split()
        try:
            answers.write(f"ok {getattr(worker, order)(*arguments)}\n")
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            answers.write(f"error {type(error).__name__}: {reason}\n")


if __name__ == "__main__":
    main()
