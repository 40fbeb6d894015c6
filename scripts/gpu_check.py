#!/usr/bin/env python3
"""Runs the bundle of scripts/gpu-check: parity, pictures a second by batch, and from a file to labels."""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
WEIGHTS = HERE / "weights/ghostnet-1x-demo.safetensors"


def environment(lib, site):
    """What the program needs to find: its own libraries and plugins, and libtorch."""
    env = dict(os.environ)
    scratch = tempfile.mkdtemp(prefix="gpu-check-")
    env["LD_LIBRARY_PATH"] = os.pathsep.join([str(HERE / "lib"), str(lib)])
    env["GST_PLUGIN_SYSTEM_PATH_1_0"] = str(HERE / "plugins")
    env["GST_PLUGIN_PATH_1_0"] = ""
    env["GST_REGISTRY_1_0"] = os.path.join(scratch, "registry.bin")
    env["GST_REGISTRY_FORK"] = "no"
    if site:
        env["GHOSTWATCH_CUDA"] = str(site)
    return env, scratch


def ghostwatch(env, *arguments):
    return subprocess.run(
        [str(HERE / "bin/ghostwatch"), *arguments], env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def speed(env, device, precision, batches, seconds):
    text = ghostwatch(
        env, "speed", "--device", device, "--precision", precision, "--seconds", str(seconds),
        "--batches", ",".join(map(str, batches)), "--weights", str(WEIGHTS),
    )  # fmt: skip
    return json.loads(text)


def torch_rates(torch, device, kind, batches, seconds):
    """Pictures a second of PyTorch: eager, and compiled, channels last, the input on the device."""
    import ghostnet

    rates = {}
    for name in ["eager", "compile"]:
        model = ghostnet.load(WEIGHTS).to(device, kind).to(memory_format=torch.channels_last)
        if name == "compile":
            model = torch.compile(model, mode="max-autotune")
        rates[name] = {}
        for batch in batches:
            try:
                x = torch.rand(batch, 3, 224, 224, device=device, dtype=kind)
                x = x.to(memory_format=torch.channels_last)
                rates[name][batch] = rate(torch, model, x, device, seconds)
            except Exception as error:  # What one of them cannot do must not hide the rest.
                print(f"  torch {name}, batch {batch}: {str(error).splitlines()[0]}", file=sys.stderr)
                break
    return rates


def rate(torch, model, x, device, seconds):
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    with torch.inference_mode():
        for _ in range(5):
            model(x)
        wait()
        started, count = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            for _ in range(10):
                model(x)
            wait()
            count += 10 * len(x)
        return count / (time.monotonic() - started)


def end_to_end(env, device, precision, scratch, streams, paced):
    """From clips to committed events: labels, labels a second, and the 99th percentile of the latency in
    milliseconds. `paced`: as cameras send them, else as fast as they can be taken."""
    folder = tempfile.mkdtemp(dir=scratch)
    journal = os.path.join(folder, "journal.db")
    config = os.path.join(folder, "config.yaml")
    clip = {"url": str(HERE / "clip.mp4")}
    if paced:
        clip |= {"realtime": True, "when_full": "latest"}
    text = {
        "version": 1,
        "streams": {f"clip-{it}": clip for it in range(streams)},
        "model": {"weights": str(WEIGHTS)},
        "device": {"use": device, "precision": precision},
        "journal": {"path": journal},
        "http": {"listen": "127.0.0.1:0"},
    }
    with open(config, "w") as file:
        json.dump(text, file)
    ghostwatch(env, "run", "--once", "--config", config)
    lines = ghostwatch(env, "--config", config, "events", "export").splitlines()
    events = [json.loads(it) for it in lines]
    frames = [it for it in events if it["type"].endswith(".frame.classified.v1")]
    if not frames:
        raise SystemExit("the clip gave no label")
    latency = sorted(it["data"]["latency_us"]["total"] for it in frames)
    times = sorted(it["data"]["ingest_time"] for it in frames)
    span = (parsed(times[-1]) - parsed(times[0])) or 1e-9
    return len(frames), len(frames) / span, latency[int(len(latency) * 0.99)] / 1e3


def parsed(text):
    import datetime

    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the bundle itself")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--seconds", type=int, default=2, help="of each figure")
    parser.add_argument("--streams", type=int, default=16, help="files at once")
    parser.add_argument("--libtorch", help="the folder with libtorch, instead of python3's torch")
    return parser.parse_args()


def main():
    args = arguments()
    batches = [int(it) for it in args.batches.split(",")]
    torch, site = None, None
    lib = args.libtorch
    if lib is None:
        try:
            import torch
        except ImportError:
            raise SystemExit("python3 has no torch: install PyTorch 2.11, or name --libtorch DIR")
        if not torch.__version__.startswith("2.11."):
            print(f"torch is {torch.__version__}; the program was built for 2.11", file=sys.stderr)
        lib = pathlib.Path(torch.__file__).parent / "lib"
        site = lib.parent.parent
    env, scratch = environment(lib, site)
    precision = "fp32" if args.device == "cpu" else "fp16"
    name = torch.cuda.get_device_name() if torch and args.device != "cpu" else platform.processor() or "cpu"
    print(f"device     {args.device} ({name}), {precision}, {time.strftime('%Y-%m-%d')}")
    found = speed(env, args.device, precision, batches, args.seconds)
    print(
        f"parity     {found['same_top1']} of {found['compared']} first labels as on the CPU in fp32, "
        f"largest error {found['max_error']:.1e}"
    )
    rates = {}
    if torch:
        kind = torch.float32 if precision == "fp32" else torch.float16
        rates = torch_rates(torch, args.device, kind, batches, args.seconds)
    print(f"{'batch':>10} {'ghostwatch':>12} {'ms':>8} {'eager':>12} {'compile':>12}   pictures/s")
    for row in found["batches"]:
        others = [rates.get(it, {}).get(row["batch"]) for it in ["eager", "compile"]]
        others = " ".join(f"{it:12.0f}" if it else f"{'-':>12}" for it in others)
        print(f"{row['batch']:>10} {row['pictures_per_second']:12.0f} {row['ms']:8.2f} {others}")
    for paced in [False, True]:
        count, fps, p99 = end_to_end(env, args.device, precision, scratch, args.streams, paced)
        how = "in their own time" if paced else "as fast as they can be taken"
        print(f"end to end {count} labels of {args.streams} files of 720p {how}: {fps:.0f}/s, 99 % within {p99:.1f} ms")


if __name__ == "__main__":
    main()
