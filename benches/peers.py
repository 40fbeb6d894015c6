"""Peers of the network alone, as workers that take the same orders as `benches/network.rs`.

    peers.py NAME WEIGHTS PICTURES

All compute the same from the same bytes: normalisation and network in one model, timm's
ghostnet_100 with the tensors of WEIGHTS. `lanes` is how many run beside each other; they share the
two cores, one thread of computation each, or one lane has both.
"""

import os
import pathlib
import sys
import tempfile
import threading
import time

import numpy as np
import timm
import torch
from safetensors.torch import load_file

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CORES = len(os.sched_getaffinity(0))


class Network(torch.nn.Module):
    """Bytes [n, side, side, 3] to logits in float32."""

    def __init__(self, weights, kind):
        super().__init__()
        tensors = load_file(weights)
        classes = tensors["classifier.bias"].numel()
        self.network = timm.create_model("ghostnet_100", num_classes=classes)
        missing, unexpected = self.network.load_state_dict(tensors, strict=False)
        assert not unexpected and all(it.endswith("num_batches_tracked") for it in missing)
        self.network = self.network.eval().to(kind, memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(MEAN))
        self.register_buffer("std", torch.tensor(STD))
        self.kind = kind

    def forward(self, pixels):
        x = (pixels.to(torch.float32) / 255.0 - self.mean) / self.std
        # Rows of interleaved pixels are what PyTorch calls channels last.
        return self.network(x.to(self.kind).permute(0, 3, 1, 2)).to(torch.float32)


def network(weights, precision):
    return Network(weights, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).eval()


class Torch:
    """PyTorch, one model for all lanes."""

    def load(self, weights, batch, precision, lanes):
        self.threads = max(1, CORES // lanes)
        torch.set_num_threads(self.threads)
        with torch.no_grad():
            self.model = self.prepare(network(weights, precision), batch)

    def prepare(self, model, batch):
        return model

    def lane(self):
        # OpenMP keeps the number per thread.
        torch.set_num_threads(self.threads)

        def run(pixels):
            with torch.inference_mode():
                return self.model(torch.from_numpy(pixels)).numpy()

        return run


class Script(Torch):
    """Traced and frozen: BatchNorm is folded."""

    def prepare(self, model, batch):
        example = torch.zeros((batch, SIDE, SIDE, 3), dtype=torch.uint8)
        return torch.jit.freeze(torch.jit.trace(model, example))


class Compiled(Torch):
    """torch.compile for this batch size, with the weights as constants."""

    def prepare(self, model, batch):
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch._dynamo.reset()
        return torch.compile(model, dynamic=False)


def exported(weights, batch):
    """The network as ONNX, for this batch size."""
    folder = tempfile.TemporaryDirectory(prefix="ghostwatch-bench.")
    path = pathlib.Path(folder.name) / "network.onnx"
    example = torch.zeros((batch, SIDE, SIDE, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.onnx.export(network(weights, "fp32"), (example,), path, opset_version=17, dynamo=False)
    return folder, str(path)


class Onnx:
    """ONNX Runtime, one session per lane."""

    def load(self, weights, batch, precision, lanes):
        import onnxruntime

        if precision != "fp32":
            raise ValueError("the CPU provider has no bf16 convolution")
        folder, path = exported(weights, batch)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, CORES // lanes)
        with folder:
            self.sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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

    def load(self, weights, batch, precision, _lanes):
        import openvino

        folder, path = exported(weights, batch)
        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this CPU has no bf16 for OpenVINO")
        with folder:
            self.model = core.compile_model(core.read_model(path), "CPU", {
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


def forever(pictures, batch):
    """Batches, over and over; a peer compiled for a size gets no other."""
    while True:
        for at in range(0, len(pictures) - batch + 1, batch):
            yield pictures[at:at + batch]


class Worker:
    def __init__(self, peer, weights, pictures):
        self.peer, self.weights = peer, weights
        self.pictures = np.fromfile(pictures, np.uint8).reshape(-1, SIDE, SIDE, 3)

    def load(self, batch, precision, lanes):
        self.batch, self.lanes = int(batch), int(lanes)
        self.peer.load(self.weights, self.batch, precision, self.lanes)
        # TorchScript compiles at its first calls.
        return self.run("0", warm=3)

    def answer(self, file):
        lane, rows = self.peer.lane(), []
        count = len(self.pictures)
        for at in range(0, count, self.batch):
            part = self.pictures[at:at + self.batch]
            whole = np.concatenate([part, np.zeros_like(self.pictures[:self.batch - len(part)])])
            rows.append(lane(whole)[:len(part)])
        np.concatenate(rows).astype(np.float32).tofile(file)
        return str(count)

    def run(self, seconds, warm=1):
        seconds = float(seconds)
        if hasattr(self.peer, "run_all") and self.peer.hint == "THROUGHPUT":
            done, took = self.peer.run_all(forever(self.pictures, self.batch), seconds)
            return f"{done} {took:.6f}"
        together, results = threading.Barrier(self.lanes), []

        def one():
            lane, batches = self.peer.lane(), forever(self.pictures, self.batch)

            def step():
                return len(lane(next(batches)))

            for _ in range(warm):
                step()
            together.wait()
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                done += step()
            results.append((done, time.perf_counter() - start))

        threads = [threading.Thread(target=one) for _ in range(self.lanes)]
        for it in threads:
            it.start()
        for it in threads:
            it.join()
        if len(results) != self.lanes:
            raise RuntimeError("a lane has failed")
        return f"{sum(it[0] for it in results)} {max(it[1] for it in results):.6f}"


def main():
    worker = Worker(PEERS[sys.argv[1]](), sys.argv[2], sys.argv[3])
    # Libraries write to standard output; the answers must be alone there.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        order, *arguments = line.split()
        try:
            answers.write(f"ok {getattr(worker, order)(*arguments)}\n")
        except Exception as error:
            answers.write(f"error {type(error).__name__}: {' '.join(str(error).split())[:300]}\n")


if __name__ == "__main__":
    main()
