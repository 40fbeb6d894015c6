#!/usr/bin/env python3
"""Makes the small weights files in `weights/` that the readers' tests load.

Needs PyTorch (CPU is enough; 2.11 made the stored files), numpy and safetensors.
Run: python3 tests/golden/make_weights.py
"""

import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "weights"
CORPUS = Path(__file__).parent.parent / "fuzz" / "corpus"
# The tests compute the same numbers: value i of tensor t is (t * 100 + i) / 8.
SHAPES = [("conv.weight", (2, 3, 2, 2)), ("bn.running_mean", (3,)), ("classifier.weight", (4, 3)), ("classifier.bias", (4,))]


def state(dtype=torch.float32, prefix=""):
    tensors = OrderedDict()
    for t, (name, shape) in enumerate(SHAPES):
        count = torch.Size(shape).numel()
        tensors[prefix + name] = ((torch.arange(count) + t * 100) / 8).to(dtype).reshape(shape)
    return tensors


def save(name, value, **options):
    torch.save(value, OUT / name, **options)


def legacy(name, value):
    save(name, value, _use_new_zipfile_serialization=False)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch ghostwatch-was-here",))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(3, 4)

    def forward(self, x):
        return self.classifier(x)


def repack(name, source, method=zipfile.ZIP_STORED, change=lambda name, data: data):
    with zipfile.ZipFile(OUT / source) as old, zipfile.ZipFile(OUT / name, "w", method) as new:
        for entry in old.namelist():
            data = change(entry, old.read(entry))
            if data is not None:
                new.writestr(zipfile.ZipInfo(entry), data, compress_type=method)


def main():
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)

    # Good ones.
    counted = state()
    counted["bn.num_batches_tracked"] = torch.tensor(7)
    save("zip.pth", counted)
    legacy("legacy.pth", counted)
    save("zip-proto4.pth", counted, pickle_protocol=4)
    save("legacy-proto4.pth", counted, pickle_protocol=4, _use_new_zipfile_serialization=False)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        save(f"zip-{kind}.pth", state(dtype))
        save_file(dict(state(dtype)), OUT / f"{kind}.safetensors")
    legacy("legacy-float16.pth", state(torch.float16))
    save("zip-module.pth", state(prefix="module."))
    legacy("legacy-module.pth", state(prefix="module."))
    save("zip-nested.pth", {"epoch": 3, "best": 0.5, "state_dict": state(), "done": True, "note": None})
    save("zip-parameter.pth", OrderedDict((k, torch.nn.Parameter(v)) for k, v in state().items()))
    # A module's own state_dict carries `_metadata`.
    model = torch.nn.Sequential(OrderedDict(classifier=torch.nn.Linear(3, 4)))
    model.load_state_dict({k: v for k, v in state().items() if k.startswith("classifier")})
    save("zip-module-metadata.pth", model.state_dict())
    strided = OrderedDict()
    for name, tensor in state().items():
        # The same values, laid out backwards; and one that starts inside of a larger storage.
        strided[name] = tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    strided["classifier.bias"] = torch.cat([torch.zeros(5), strided["classifier.bias"], torch.ones(2)])[5:9]
    save("zip-strided.pth", strided)
    legacy("legacy-strided.pth", strided)
    shared = state()
    shared["again"] = shared["conv.weight"]
    save("zip-shared.pth", shared)
    full = {"arch": "ghostnet_1x", "num_classes": "4", "resize": "128", "input": "112", "mean": "0.485,0.456,0.406",
            "std": "0.229,0.224,0.225", "trained_on": "nothing"}
    save_file(dict(counted), OUT / "full.safetensors", metadata=full)
    save_file(dict(state()), OUT / "bare.safetensors")

    # Bad ones.
    evil = state()
    evil["classifier.bias"] = Evil()
    save("evil-zip.pth", evil)
    legacy("evil-legacy.pth", evil)
    (OUT / "evil-bare.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    save("evil-proto4.pth", evil, pickle_protocol=4)
    save("whole-model.pth", Module())
    torch.jit.script(Module()).save(str(OUT / "torchscript.pt"))
    save("not-a-dict.pth", [1, 2, 3])
    save("not-tensors.pth", {"classifier.weight": "none"})
    save("integers.pth", {"classifier.weight": torch.arange(12).reshape(4, 3)})
    nan = state()
    nan["conv.weight"][0, 0, 0, 0] = float("nan")
    nan["classifier.bias"][1] = float("inf")
    save("nan.pth", nan)
    repack("compressed.pth", "zip.pth", zipfile.ZIP_DEFLATED)
    repack("big-endian.pth", "zip.pth", change=lambda n, d: b"big" if n.endswith("byteorder") else d)
    repack("no-storage.pth", "zip.pth", change=lambda n, d: None if n.endswith("data/0") else d)
    repack("short-storage.pth", "zip.pth", change=lambda n, d: d[:-4] if n.endswith("data/0") else d)
    for name in ("zip.pth", "legacy.pth", "full.safetensors"):
        data = (OUT / name).read_bytes()
        (OUT / f"truncated-{name}").write_bytes(data[: len(data) * 2 // 3])
    (OUT / "header-2-63.safetensors").write_bytes(struct.pack("<Q", 1 << 63) + b"{}")

    # What the fuzzers start from: one of each form.
    pths = ["zip", "zip-proto4", "zip-strided", "zip-nested", "zip-parameter", "legacy", "legacy-proto4", "legacy-strided", "evil-zip"]
    for folder, names in (("pth", [f"{n}.pth" for n in pths]), ("safetensors", ["full.safetensors", "float16.safetensors"])):
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(OUT / name, CORPUS / folder / name)


if __name__ == "__main__":
    sys.exit(main())
