"""GhostNet 1.0x in PyTorch, as people write it, with the names of the published checkpoint."""

import json
import struct

import torch
from torch import nn
from torch.nn import functional

# Kernel, channels inside, channels out, squeeze-excite, stride: the table in src/infer/ghostnet.rs.
STAGES = [
    [(3, 16, 16, 0, 1)],
    [(3, 48, 24, 0, 2)],
    [(3, 72, 24, 0, 1)],
    [(5, 72, 40, 1, 2)],
    [(5, 120, 40, 1, 1)],
    [(3, 240, 80, 0, 2)],
    [(3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1)],
    [(5, 672, 160, 1, 2)],
    [(5, 960, 160, 0, 1), (5, 960, 160, 1, 1), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1)],
]


def conv(i, o, kernel=1, stride=1, groups=1, bias=False):
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=bias)


class Ghost(nn.Module):
    def __init__(self, i, o, relu):
        super().__init__()
        end = [nn.ReLU(inplace=True)] if relu else []
        self.primary_conv = nn.Sequential(conv(i, o // 2), nn.BatchNorm2d(o // 2), *end)
        self.cheap_operation = nn.Sequential(conv(o // 2, o // 2, 3, groups=o // 2), nn.BatchNorm2d(o // 2), *end)

    def forward(self, x):
        first = self.primary_conv(x)
        return torch.cat([first, self.cheap_operation(first)], 1)


class Squeeze(nn.Module):
    def __init__(self, channels):
        super().__init__()
        reduced = max(4, int(channels * 0.25 + 2) // 4 * 4)
        if reduced < 0.9 * channels * 0.25:
            reduced += 4
        self.conv_reduce = conv(channels, reduced, bias=True)
        self.conv_expand = conv(reduced, channels, bias=True)

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)
        return x * functional.hardsigmoid(self.conv_expand(functional.relu(self.conv_reduce(mean))))


class Bottleneck(nn.Module):
    def __init__(self, i, kernel, middle, o, squeeze, stride):
        super().__init__()
        self.ghost1 = Ghost(i, middle, True)
        self.conv_dw = self.bn_dw = self.se = None
        if stride > 1:
            self.conv_dw, self.bn_dw = conv(middle, middle, kernel, stride, middle), nn.BatchNorm2d(middle)
        if squeeze:
            self.se = Squeeze(middle)
        self.ghost2 = Ghost(middle, o, False)
        self.shortcut = nn.Sequential()
        if i != o or stride > 1:
            self.shortcut = nn.Sequential(
                conv(i, i, kernel, stride, i), nn.BatchNorm2d(i), conv(i, o), nn.BatchNorm2d(o)
            )

    def forward(self, x):
        y = self.ghost1(x)
        if self.conv_dw is not None:
            y = self.bn_dw(self.conv_dw(y))
        if self.se is not None:
            y = self.se(y)
        return self.ghost2(y) + self.shortcut(x)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn1 = conv(160, 960), nn.BatchNorm2d(960)

    def forward(self, x):
        return functional.relu(self.bn1(self.conv(x)))


class GhostNet(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self.conv_stem, self.bn1 = conv(3, 16, 3, 2), nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for stage in STAGES:
            rows = []
            for kernel, middle, out, squeeze, stride in stage:
                rows.append(Bottleneck(channels, kernel, middle, out, squeeze, stride))
                channels = out
            blocks.append(nn.Sequential(*rows))
        self.blocks = nn.Sequential(*blocks, nn.Sequential(Last()))
        self.conv_head = conv(960, 1280, bias=True)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x):
        x = self.blocks(functional.relu(self.bn1(self.conv_stem(x))))
        x = functional.relu(self.conv_head(x.mean((2, 3), keepdim=True)))
        return self.classifier(x.flatten(1))


def load(path):
    """The network with the weights of a safetensors file, in float32 on the CPU."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header, data = json.loads(file.read(size)), file.read()
    header.pop("__metadata__", None)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    tensors = {}
    for name, it in header.items():
        start, end = it["data_offsets"]
        flat = torch.frombuffer(bytearray(data[start:end]), dtype=kinds[it["dtype"]])
        tensors[name] = flat.reshape(it["shape"])
    model = GhostNet(tensors["classifier.bias"].shape[0])
    missing, unknown = model.load_state_dict(tensors, strict=False)
    missing = [it for it in missing if not it.endswith("num_batches_tracked")]
    if missing or unknown:
        raise SystemExit(f"{path}: missing {missing[:3]}, unknown {unknown[:3]}")
    return model.eval()
