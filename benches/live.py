"""L4 of the bench: how many live streams one daemon labels in time, and what each costs.

A stream is a clip that comes at its own rate. A number of streams is carried if every stream has
its frames, none was dropped, and 99 % of them were labelled within 200 ms of their arrival.
"""

import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

import videos
from measure import GHOSTWATCH, LIVE, WEIGHTS, clip, cpu_seconds, environment

RATES = [5, 15, 30]
LATENCY_MS = 200
START, SETTLE, TRIAL, END = 120, 3.0, 8.0, 30
# Longer than a trial: what happens when a clip starts over is not measured.
CLIP_SECONDS = 20
STREAMS_MAX = 128
TRIALS_MAX = 6


def percentile(values, percent):
    """The smallest value that at least so many percent of the values do not exceed."""
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def ready(process, address):
    """Waits until the daemon says that its streams are labelled."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError("the daemon ended while it should run")
        try:
            direct.open(f"http://{address}/readyz", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the daemon was not ready after {START} s")


def trial(size, fps, streams, device):
    """Runs the daemon with so many streams; what came of it."""
    path, _ = clip(size, fps, CLIP_SECONDS)
    fields = f'url: "{path}", loop: true, realtime: true, when_full: latest'
    with tempfile.TemporaryDirectory(prefix="ghostwatch-bench.") as folder:
        listed = {f"s{it}": fields for it in range(streams)}
        address = f"127.0.0.1:{free_port()}"
        config = videos.configuration(pathlib.Path(folder) / "it", listed, WEIGHTS, device, address)
        process = subprocess.Popen([GHOSTWATCH, "--config", config, "run"], env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ready(process, address)
            time.sleep(SETTLE)
            before, taken = cpu_seconds(process.pid), time.time()
            time.sleep(TRIAL)
            after, end = cpu_seconds(process.pid), time.time()
            resident = memory(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        rows = [it for it in videos.events(GHOSTWATCH, config)
                if taken <= videos.labelled_at(it) < end]
    latencies = [it["latency_us"]["total"] / 1e3 for it in rows]
    seconds = end - taken
    result = {
        "streams": streams, "frames": len(rows), "rss_mb": resident,
        "cores": (after - before) / seconds,
        "dropped": sum(sum(it["skipped"].values()) for it in rows),
        "share": len(rows) / (streams * fps * seconds),
    }
    if latencies:
        result |= {"p50": percentile(latencies, 50), "p99": percentile(latencies, 99)}
    # A frame's period at either end of the trial may fall outside of it.
    whole = (len(rows) + 2 * streams) / (streams * fps * seconds)
    result["carried"] = bool(
        latencies and result["dropped"] == 0 and 1.0 <= whole and result["p99"] <= LATENCY_MS)
    return result


def memory(pid):
    """Resident megabytes."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError("the kernel tells no VmRSS")


def search(size, fps, guess, device, say):
    """The largest number of streams that is carried, with all trials."""
    trials, low, high = [], 0, None
    count = min(max(1, guess), STREAMS_MAX)
    while len(trials) < TRIALS_MAX:
        result = trial(size, fps, count, device)
        trials.append(result)
        say(f"L4 {size} at {fps} fps, {count} streams: {'carried' if result['carried'] else 'too many'}")
        if result["carried"]:
            low = count
        else:
            high = count
        if low == STREAMS_MAX or (high is not None and high - low <= max(1, low // 16)):
            break
        wider = max(low + 1, low * 3 // 2) if low else max(1, count // 2)
        count = min(wider if high is None or not low else (low + high) // 2, STREAMS_MAX)
        if any(it["streams"] == count for it in trials):
            break
    return {"most": low, "trials": trials}


def run(options, store, say):
    """Measures what is missing in `store`; the rate that files are labelled at gives the first guess."""
    device = options.device
    for size in options.sizes:
        speed = store.values.get(f"L3 {size} round 0", {}).get(LIVE, 80)
        for fps in RATES:
            store.take(f"L4 {size} {fps}", lambda size=size, fps=fps, speed=speed: search(
                size, fps, int(speed * 0.8 / fps), device, say))
    growth(options, store, say)


def growth(options, store, say):
    """Few to many streams of one kind, for the plots."""
    size, fps = "720p", 5
    most = store.values[f"L4 {size} {fps}"]["most"]
    counts = sorted({it for it in (1, 2, 4, 8, 16, most, most * 3 // 2) if 0 < it <= most * 3 // 2 + 1})
    for count in counts:
        say(f"L4 growth: {count} streams of {size} at {fps} fps")
        store.take(f"L4 growth {count}", lambda count=count: trial(size, fps, count, options.device))
