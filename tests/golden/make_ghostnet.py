#!/usr/bin/env python3
"""Makes ghostnet.json: logits of timm's ghostnet_100 for weights and inputs that a formula gives.

The formula is integers and one rounding to f32, so that golden.rs makes the same weights and no
weight file is stored. Needs: torch, timm, numpy. Run: python3 tests/golden/make_ghostnet.py
"""

import json
import pathlib

import numpy as np
import timm
import torch

HERE = pathlib.Path(__file__).parent
SEED_INPUT = 1 << 40
# Of the batch of 32 only these classes are stored.
EVERY = 125


def splitmix(start: int, count: int) -> np.ndarray:
    """Uniform f64 in [-1, 1) in steps of 2^-23: numbers start.. of the splitmix64 sequence."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(start + 1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / float(1 << 23) - 1.0


def scale_and_shift(name: str, shape: tuple) -> tuple:
    """Keeps the activations near 1 through all layers."""
    if name.endswith("running_var"):
        return 0.5, 1.0
    if name.endswith("running_mean") or name.endswith("bias"):
        return 0.125, 0.0
    if len(shape) == 1:
        return 0.5, 1.0
    fan_in = int(np.prod(shape[1:]))
    return float(np.sqrt(3.0 / fan_in)), 0.0


def weights(model: torch.nn.Module) -> dict:
    """Fills the parameters in the order of the state dict, one sequence over all of them."""
    filled, start = {}, 0
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        scale, shift = scale_and_shift(name, tuple(tensor.shape))
        values = splitmix(start, tensor.numel()) * scale + shift
        filled[name] = torch.from_numpy(values.astype(np.float32)).reshape(tensor.shape)
        start += tensor.numel()
    return filled


def inputs(count: int, side: int) -> torch.Tensor:
    """Pictures of [3, side, side] in [-2, 2); the first ones do not depend on the count."""
    values = splitmix(SEED_INPUT, count * 3 * side * side) * 2.0
    return torch.from_numpy(values.astype(np.float32)).reshape(count, 3, side, side)


def short(values: torch.Tensor) -> list:
    """Nine digits: enough for any f32, and 1e-9 of an f64."""
    return [[float(f"{it:.9g}") for it in row] for row in values.tolist()]


def case(classes: int, side: int) -> dict:
    model = timm.create_model("ghostnet_100", num_classes=classes).eval()
    missing, unexpected = model.load_state_dict(weights(model), strict=False)
    assert not unexpected and all(it.endswith("num_batches_tracked") for it in missing)
    with torch.no_grad():
        x = inputs(32, side)
        f32 = model(x[:3])
        f64 = model.double()(x.double())
    spread = ((f32.double() - f64[:3]).abs().max() / f64.abs().max()).item()
    print(f"{classes} classes, {side}x{side}: max |logit| {f64.abs().max():.3f}, "
          f"std over pictures {f64.std(0).mean():.3f}, f32 to f64 {spread:.1e}")
    return {
        "classes": classes,
        "side": side,
        "f32": short(f32),
        "f64": short(f64[:3]),
        "every": EVERY if classes > EVERY else 1,
        "f64_of_32": short(f64[:, :: EVERY if classes > EVERY else 1]),
    }


def main() -> None:
    torch.manual_seed(0)
    made = {
        "by": f"timm {timm.__version__} ghostnet_100, torch {torch.__version__.split('+')[0]}",
        "cases": [case(1000, 224), case(12, 96)],
    }
    (HERE / "ghostnet.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
