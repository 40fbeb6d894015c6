"""The network in PyTorch, with the tensors of the shipped checkpoint, and its export to ONNX.

    torch_network.py WEIGHTS FOLDER BATCH...    writes FOLDER/network-BATCH.onnx for each batch size

The export is a process of its own, so that no contender has PyTorch in it that does not need it.
"""

import pathlib
import sys

import timm
import torch
from safetensors.torch import load_file

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def export(weights, folder, batches):
    model = network(weights, "fp32")
    for batch in batches:
        path = pathlib.Path(folder) / f"network-{batch}.onnx"
        part = path.with_suffix(".part")
        example = torch.zeros((int(batch), SIDE, SIDE, 3), dtype=torch.uint8)
        with torch.no_grad():
            torch.onnx.export(model, (example,), part, opset_version=17, dynamo=False)
        part.rename(path)


if __name__ == "__main__":
    export(sys.argv[1], sys.argv[2], sys.argv[3:])
