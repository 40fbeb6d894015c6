#!/usr/bin/env python3
"""Writes demo.json: the labels that PyTorch gives photo.jpg with weights/ghostnet-1x-demo.safetensors.

photo.jpg is a frame of the clip bikes.mp4 (scripts/setup fetches it):
    ffmpeg -ss 4 -i bikes.mp4 -frames:v 1 -vf scale=320:-2 -q:v 4 photo.jpg
Needs: torch, torchvision, timm, Pillow, safetensors.
Run: python3 tests/golden/make_demo.py
"""

import json
import pathlib

import PIL
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from torchvision.transforms import functional

GOLDEN = pathlib.Path(__file__).parent
CHECKPOINT = GOLDEN.parents[1] / "weights" / "ghostnet-1x-demo.safetensors"


def main() -> None:
    with safe_open(CHECKPOINT, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    model = timm.create_model("ghostnet_100", num_classes=int(metadata["num_classes"])).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(it.endswith("num_batches_tracked") for it in missing)
    mean, std = ([float(n) for n in metadata[it].split(",")] for it in ("mean", "std"))
    picture = Image.open(GOLDEN / "photo.jpg").convert("RGB")
    picture = functional.resize(picture, int(metadata["resize"]))
    picture = functional.center_crop(picture, int(metadata["input"]))
    x = functional.normalize(functional.to_tensor(picture), mean, std)
    with torch.no_grad():
        logits = model(x[None])[0]
    best = logits.softmax(0).topk(5)
    versions = {it.__name__: it.__version__.split("+")[0] for it in (torch, torchvision, timm, PIL)}
    reference = {
        "by": versions,
        "top": [
            {"label_id": int(index), "confidence": float(f"{float(value):.9g}")}
            for value, index in zip(best.values, best.indices)
        ],
    }
    (GOLDEN / "demo.json").write_text(json.dumps(reference, indent=1) + "\n")
    print(reference)


if __name__ == "__main__":
    main()
