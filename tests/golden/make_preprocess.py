"""Makes the golden cases of the preprocess tests: preprocess.json and pictures/.

    pip install pillow numpy            # torchvision too, for --torchvision
    python tests/golden/make_preprocess.py [--torchvision]

The pictures that are resized come from an integer formula that the tests repeat in Rust, so only
hashes are stored. `--torchvision` proves that `resize_and_crop` below, which is written out so that
this script needs no PyTorch, is what torchvision's own transforms do.
"""

import hashlib
import io
import json
import pathlib
import struct
import sys
import zlib

import numpy as np
import PIL
from PIL import Image, features

HERE = pathlib.Path(__file__).parent
PICTURES = HERE / "pictures"

RESIZE_CASES = [
    # width, height, resize, crop
    (1920, 1080, 256, 224), (1080, 1920, 256, 224), (1280, 720, 256, 224), (3840, 2160, 256, 224),
    (640, 360, 256, 224), (640, 480, 256, 224), (352, 288, 256, 224), (256, 256, 256, 224),
    (224, 224, 256, 224), (455, 256, 256, 224), (256, 455, 256, 224), (257, 255, 256, 224),
    (320, 240, 256, 224), (16, 16, 256, 224), (17, 19, 256, 224), (1, 1, 256, 224),
    (2, 3, 256, 224), (1, 7, 256, 224), (9, 1, 256, 224), (1919, 1079, 256, 224),
    (999, 777, 256, 224), (2000, 20, 256, 224), (30, 3000, 256, 224), (5, 900, 256, 224),
    (1367, 769, 256, 224), (511, 513, 256, 224), (4096, 1716, 256, 224), (300, 299, 256, 224),
    (1920, 1080, 128, 112), (640, 361, 128, 112), (97, 131, 128, 112), (127, 129, 128, 112),
    (128, 129, 128, 112), (3, 400, 128, 112), (800, 600, 232, 224), (801, 600, 235, 224),
    (600, 803, 224, 224), (500, 375, 342, 299), (7680, 4320, 256, 224),
]

GRAY_CASES = [(1920, 1080, 256, 224), (33, 57, 256, 224), (641, 480, 128, 112)]

YUV_CASES = [
    # width, height, resize, crop, matrix, full range, siting across, siting down
    (1920, 1080, 256, 224, "bt709", False, "cosited", "centre"),
    (1280, 720, 256, 224, "bt709", True, "cosited", "centre"),
    (641, 481, 256, 224, "bt601", False, "cosited", "centre"),
    (352, 288, 256, 224, "bt601", True, "centre", "centre"),
    (97, 131, 256, 224, "bt2020", False, "cosited", "cosited"),
    (17, 16, 256, 224, "bt601", False, "centre", "cosited"),
    (801, 603, 128, 112, "bt2020", True, "centre", "centre"),
    (1, 1, 256, 224, "bt601", False, "cosited", "centre"),
    (3, 2, 256, 224, "bt709", False, "centre", "centre"),
    (700, 30, 256, 224, "bt709", False, "cosited", "centre"),
]


def bytes_of(width, height, channel, seed):
    """The test picture: checks of noise and of ramps. uint32 arithmetic, as in the tests."""
    x = np.arange(width, dtype=np.uint32)[None, :]
    y = np.arange(height, dtype=np.uint32)[:, None]
    base = x * x + 3 * y * y + 2 * x * y + np.uint32(channel * 85 + seed * 29)
    noise = (base * np.uint32(2654435761)) >> np.uint32(24)
    ramp = (2 * x + y + np.uint32(channel * 40)) & np.uint32(255)
    return np.where((((x >> 5) ^ (y >> 5)) & 1) == 1, noise, ramp).astype(np.uint8)


def resized(width, height, size):
    """`_compute_resized_output_size` of torchvision.transforms.functional."""
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    return (new_short, new_long) if width <= height else (new_long, new_short)


def crop_box(width, height, crop):
    """The box of `center_crop` in torchvision.transforms.functional."""
    top = int(round((height - crop) / 2.0))
    left = int(round((width - crop) / 2.0))
    return left, top, left + crop, top + crop


def resize_and_crop(image, size, crop):
    """torchvision's Resize(size) and CenterCrop(crop) on a Pillow image."""
    wide, high = resized(image.width, image.height, size)
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    return image.crop(crop_box(wide, high, crop))


def check_against_torchvision(image, size, crop, ours):
    """Fails if torchvision itself gives other bytes."""
    from torchvision.transforms import CenterCrop, Resize

    theirs = CenterCrop(crop)(Resize(size)(image))
    assert theirs.tobytes() == ours.tobytes(), (image.size, size, crop)


def resize_case(case, gray, torchvision):
    width, height, size, crop = case
    seed = width + height
    channels = [bytes_of(width, height, it, seed) for it in range(1 if gray else 3)]
    image = Image.fromarray(channels[0] if gray else np.dstack(channels)).convert("RGB")
    ours = resize_and_crop(image, size, crop)
    if torchvision:
        check_against_torchvision(image, size, crop, ours)
    digest = hashlib.sha256(ours.tobytes()).hexdigest()
    return {"width": width, "height": height, "resize": size, "crop": crop, "gray": gray,
            "seed": seed, "sha256": digest}


def weights(input_size, output_size):
    """The matrix of the bilinear antialiased resize, in float64."""
    scale = input_size / output_size
    support = max(scale, 1.0)
    centre = (np.arange(output_size)[:, None] + 0.5) * scale
    distance = (np.arange(input_size)[None, :] + 0.5 - centre) / support
    matrix = np.maximum(0.0, 1.0 - np.abs(distance))
    return matrix / matrix.sum(axis=1, keepdims=True)


def upsample(plane, size, siting, axis):
    """Doubles one axis of a chroma plane, bilinear, the border repeated."""
    position = np.arange(size) / 2 - (0.25 if siting == "centre" else 0.0)
    position = np.clip(position, 0, plane.shape[axis] - 1)
    below = position.astype(int)
    above = np.minimum(below + 1, plane.shape[axis] - 1)
    part = (position - below).reshape([-1, 1] if axis == 0 else [1, -1])
    return np.take(plane, below, axis) * (1 - part) + np.take(plane, above, axis) * part


def to_rgb(y, u, v, matrix, full):
    """The exact conversion, in float64."""
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722),
                 "bt2020": (0.2627, 0.0593)}[matrix]
    green = 1 - red - blue
    y = y if full else (y - 16) * 255 / 219
    u, v = ((it - 128) * (1 if full else 255 / 224) for it in (u, v))
    r = y + 2 * (1 - red) * v
    b = y + 2 * (1 - blue) * u
    return np.stack([r, (y - red * r - blue * b) / green, b])


def yuv_case(case):
    """Chroma to full size, then RGB, then the resize: all in float64. Stores 64 pixels."""
    width, height, size, crop, matrix, full, across, down = case
    seed = width + height
    half = (width + 1) // 2, (height + 1) // 2
    # Squeezed so that every pixel lies inside the RGB cube.
    y = 80 + bytes_of(width, height, 0, seed) * 90.0 // 255
    u, v = (98 + bytes_of(*half, it, seed) * 60.0 // 255 for it in (1, 2))
    u, v = (upsample(upsample(it, height, down, 0), width, across, 1) for it in (u, v))
    rgb = to_rgb(y, u, v, matrix, full)
    assert 0 <= rgb.min() and rgb.max() <= 255, "in gamut"
    wide, high = resized(width, height, size)
    left, top, right, bottom = crop_box(wide, high, crop)
    rows, columns = weights(height, high)[top:bottom], weights(width, wide)[left:right]
    pixels = np.stack([rows @ it @ columns.T for it in rgb], axis=-1)
    step = crop // 8
    samples = pixels[step // 2::step, step // 2::step][:8, :8].round(2)
    return {"width": width, "height": height, "resize": size, "crop": crop, "matrix": matrix,
            "full_range": full, "siting_x": across, "siting_y": down, "seed": seed,
            "samples": samples.flatten().tolist()}


def png(width, height, depth, colour, rows, chunks=(), interlace=0):
    """A PNG file of any bit depth, which Pillow itself cannot write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    data = zlib.compress(b"".join(b"\0" + it for it in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(
        chunk(*it) for it in chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def adam7(samples, pack):
    """The rows of an interlaced PNG, pass by pass."""
    for x, y, across, down in [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4),
                               (1, 0, 2, 2), (0, 1, 1, 2)]:
        yield from (pack(it) for it in samples[y::down, x::across])


def raw_pngs():
    """Every colour type and bit depth, some with transparency."""
    width, height = 21, 9
    palette = bytes(it * 7 % 256 for it in range(3 * 256))
    for colour, name, channels, depths in [
        (0, "gray", 1, (1, 2, 4, 8, 16)), (2, "rgb", 3, (8, 16)), (3, "palette", 1, (1, 2, 4, 8)),
        (4, "gray-alpha", 2, (8, 16)), (6, "rgba", 4, (8, 16)),
    ]:
        for depth in depths:
            row_bytes = (width * channels * depth + 7) // 8
            rows = [bytes_of(row_bytes, height, depth, colour)[it].tobytes()
                    for it in range(height)]
            chunks = [(b"PLTE", palette[:3 << depth])] if colour == 3 else []
            yield f"{name}-{depth}.png", png(width, height, depth, colour, rows, chunks)
    small = [bytes(min(it, 255) for it in range(row, row + 2 * width)) for row in range(height)]
    yield "gray-16-dark.png", png(width, height, 16, 0, [
        b"".join(struct.pack(">H", 20 * it + row) for it in range(width)) for row in range(height)])
    yield "gray-8-trns.png", png(width, height, 8, 0, [it[:width] for it in small],
                                 [(b"tRNS", struct.pack(">H", 7))])
    yield "palette-trns.png", png(width, height, 8, 3, [it[:width] for it in small], [
        (b"PLTE", palette), (b"tRNS", bytes(range(0, 256, 3)))])
    pixels = np.dstack([bytes_of(width, height, it, 3) for it in range(3)])
    yield "rgb-8-interlaced.png", png(width, height, 8, 2, adam7(pixels, lambda it: it.tobytes()),
                                      interlace=1)
    bits = bytes_of(width, height, 1, 3) >> 7
    yield "gray-1-interlaced.png", png(
        width, height, 1, 0, adam7(bits, lambda it: np.packbits(it).tobytes()), interlace=1)
    yield "palette-short.png", png(width, height, 8, 3, [it[:width] for it in small], [
        (b"PLTE", palette[:30])])


def jpegs():
    """Every subsampling, odd sizes, progressive, grey, RGB without a transform, CMYK."""
    def picture(width, height):
        return Image.fromarray(np.dstack([bytes_of(width, height, it, 5) for it in range(3)]))

    for width, height in [(61, 45), (16, 16), (1, 1), (33, 2)]:
        for name, subsampling in [("444", 0), ("422", 1), ("420", 2)]:
            for progressive in (False, True):
                if (width, height) != (61, 45) and progressive:
                    continue
                file = io.BytesIO()
                picture(width, height).save(file, "JPEG", quality=80, progressive=progressive,
                                            subsampling=subsampling)
                kind = "-progressive" if progressive else ""
                yield f"{width}x{height}-{name}{kind}.jpg", file.getvalue()
    # Pillow writes neither 4:4:0 nor 4:1:1. In a square picture those have as many blocks as 4:2:2
    # and 4:2:0, so other sampling factors in the header make a valid, if jumbled, picture.
    for name, subsampling, before, after in [("440", 1, 0x21, 0x12), ("411", 2, 0x22, 0x41)]:
        file = io.BytesIO()
        picture(61, 61).save(file, "JPEG", quality=80, subsampling=subsampling)
        old = struct.pack(">BHHBBB", 8, 61, 61, 3, 1, before)
        assert file.getvalue().count(old) == 1
        yield f"61x61-{name}.jpg", file.getvalue().replace(old, old[:-1] + bytes([after]))
    for mode in ("L", "CMYK"):
        file = io.BytesIO()
        picture(61, 45).convert(mode).save(file, "JPEG", quality=75)
        yield f"61x45-{mode.lower()}.jpg", file.getvalue()
    file = io.BytesIO()
    picture(61, 45).save(file, "JPEG", quality=90, keep_rgb=True)
    yield "61x45-rgb.jpg", file.getvalue()
    file = io.BytesIO()
    picture(61, 45).save(file, "JPEG", quality=60, restart_marker_blocks=3)
    yield "61x45-restart.jpg", file.getvalue()


def picture_case(name, data):
    (PICTURES / name).write_bytes(data)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {"file": name, "width": image.width, "height": image.height,
            "sha256": hashlib.sha256(image.tobytes()).hexdigest()}


def picture_cases():
    for name, data in [*jpegs(), *raw_pngs()]:
        yield picture_case(name, data)
    plain = Image.fromarray(np.dstack([bytes_of(37, 23, it, 9) for it in range(3)]))
    file = io.BytesIO()
    plain.save(file, "PNG", optimize=True)
    yield picture_case("rgb-filtered.png", file.getvalue())


def main():
    torchvision = "--torchvision" in sys.argv
    PICTURES.mkdir(exist_ok=True)
    golden = {
        "made_with": {"pillow": PIL.__version__,
                      "libjpeg_turbo": features.version("libjpeg_turbo")},
        "resize": [resize_case(it, False, torchvision) for it in RESIZE_CASES]
        + [resize_case(it, True, torchvision) for it in GRAY_CASES],
        "yuv": [yuv_case(it) for it in YUV_CASES],
        "pictures": list(picture_cases()),
    }
    lines = ",\n".join(
        f'"{key}": [\n' + ",\n".join(json.dumps(it) for it in value) + "\n]"
        if isinstance(value, list) else f'"{key}": {json.dumps(value)}'
        for key, value in golden.items())
    (HERE / "preprocess.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
