#!/usr/bin/env python3
"""Writes PyTorch's logits for the self-test's pictures, and the hash of the labels, into the
metadata of weights/ghostnet-1x-demo.safetensors, and its sum into weights/SHA256SUMS.

The tensors stay as they are, byte for byte. Needs: torch, timm, numpy, safetensors.
Run: python3 tests/golden/add_reference.py
"""

import hashlib
import json
import pathlib
import struct

import numpy as np
import timm
import torch
from safetensors.torch import load_file

WEIGHTS = pathlib.Path(__file__).parents[2] / "weights"
CHECKPOINT = WEIGHTS / "ghostnet-1x-demo.safetensors"
LABELS = WEIGHTS / "imagenet_classes.txt"


def pictures(side: int) -> np.ndarray:
    """selftest-v1: the same integers as src/infer/selftest.rs, [3, side, side, 3] bytes."""
    y, x = np.mgrid[0:side, 0:side].astype(np.uint64)
    gradient = [x * 255 // side, y * 255 // side, (x + y) * 255 // (2 * side)]
    dx, dy = (np.abs(2 * it.astype(np.int64) - side).astype(np.uint64) for it in (x, y))
    ring = ((dx * dx + dy * dy) * 4 // side) & 255
    rings = [ring, 255 - ring, 64 + ring // 2]
    word = np.uint64(0xFFFFFFFF)
    cell_x, cell_y = x * 9 // side, y * 9 // side
    mixed = (cell_x * 73856093 & word) ^ (cell_y * 19349663 & word)
    mixed = mixed * 2654435761 & word
    blocks = [mixed >> 24, mixed >> 16, mixed >> 8]
    sets = [np.stack(it, axis=-1) & 255 for it in (gradient, rings, blocks)]
    return np.stack(sets).astype(np.uint8)


def fnv(data: bytes) -> int:
    """What the unit test in selftest.rs compares."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def logits(metadata: dict) -> list:
    model = timm.create_model("ghostnet_100", num_classes=int(metadata["num_classes"])).eval()
    missing, unexpected = model.load_state_dict(load_file(CHECKPOINT), strict=False)
    assert not unexpected and all(it.endswith("num_batches_tracked") for it in missing)
    numbers = {it: [float(n) for n in metadata[it].split(",")] for it in ("mean", "std")}
    mean, std = (torch.tensor(numbers[it]).view(3, 1, 1) for it in ("mean", "std"))
    x = torch.from_numpy(pictures(int(metadata["input"]))).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model((x.float() / 255 - mean) / std)
    for row in out:
        top = row.topk(2)
        print(f"class {top.indices[0]}, logit {top.values[0]:.3f}, next {top.values[1]:.3f}")
    return [[float(f"{it:.9g}") for it in row] for row in out.tolist()]


def main() -> None:
    data = CHECKPOINT.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    by = f"pytorch {torch.__version__.split('+')[0]}"
    reference = {"by": by, "pictures": "selftest-v1", "logits": logits(metadata)}
    metadata["reference"] = json.dumps(reference, separators=(",", ":"))
    if LABELS.exists():
        metadata["labels_sha256"] = hashlib.sha256(LABELS.read_bytes()).hexdigest()
    else:
        print(f"no {LABELS.name}: run again when it is there")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = struct.pack("<Q", len(text)) + text + data[8 + length :]
    CHECKPOINT.write_bytes(written)
    sums = WEIGHTS / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.exists() else []
    lines = [it for it in lines if not it.endswith("  " + CHECKPOINT.name)]
    lines.append(f"{hashlib.sha256(written).hexdigest()}  {CHECKPOINT.name}")
    sums.write_text("\n".join(sorted(lines, key=lambda it: it.split("  ")[1])) + "\n")
    for side in (112, 224):
        print(f"pictures({side}): fnv {fnv(pictures(side).tobytes()):#x}")


if __name__ == "__main__":
    main()
