"""L4 of the bench: how many live streams one daemon labels in time, and what each costs.

A stream is a clip that comes at its own rate. A number of streams is carried if every stream has
its frames, none was dropped, and 99 % of them were labelled within 200 ms of their arrival.
Values in the store: `L4 SIZE FPS trial COUNT`.
"""

import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

import videos
from measure import CORES, SIZES, Failed, clip, cpu_seconds, environment
import measure

RATES = [5, 15, 30]
LATENCY_MS = 200
# Seconds: until all streams are labelled, until the figures have settled, of a trial, until the
# daemon has ended. Together less than a clip has: what happens when one starts over is not measured.
START, SETTLE, TRIAL, END = 60, 2.0, 6.0, 30
STREAMS_MAX = 128
TRIALS_MAX = 5
# Few to many streams of one kind, for the plots and for what one more costs.
GROWTH = ("720p", 5)
GROWTH_COUNTS = [1, 4, 8, 16]


def percentile(values, percent):
    """The smallest value that at least so many percent of the values do not exceed."""
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def ready(process, address):
    """Waits until the daemon says that its streams are labelled; whether it did."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START * measure.patience
    while time.monotonic() < until:
        if process.poll() is not None:
            raise Failed(f"the daemon ended with {process.returncode} while it should run")
        try:
            direct.open(f"http://{address}/readyz", timeout=5)
            return True
        except OSError:
            time.sleep(0.1)
    return False


def trial(size, fps, streams, device, ghostwatch):
    """Runs the daemon with so many streams; what came of it."""
    path, _ = clip(size, fps)
    fields = f'url: "{path}", loop: true, realtime: true, when_full: latest'
    with tempfile.TemporaryDirectory(prefix="ghostwatch-bench.") as folder:
        listed = {f"s{it}": fields for it in range(streams)}
        address = f"127.0.0.1:{free_port()}"
        config = videos.configuration(pathlib.Path(folder) / "it", listed, device, address)
        with open(measure.FOLDER / "workers.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen([ghostwatch, "--config", config, "run"], env=environment(),
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            if not ready(process, address):
                return {"streams": streams, "carried": False, "failed": "not ready in time"}
            time.sleep(SETTLE)
            before, taken = cpu_seconds(process.pid), time.time()
            time.sleep(TRIAL)
            after, end = cpu_seconds(process.pid), time.time()
            resident = memory(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END * measure.patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        rows = [it for it in videos.events(ghostwatch, config)
                if taken <= videos.labelled_at(it) < end]
    return judged(rows, streams, fps, end - taken) | {
        "rss_mb": resident, "cores": (after - before) / (end - taken)}


def judged(rows, streams, fps, seconds):
    """What the events of a trial say."""
    latencies = [it["latency_us"]["total"] / 1e3 for it in rows]
    result = {"streams": streams, "frames": len(rows),
              "dropped": sum(sum(it["skipped"].values()) for it in rows),
              "share": len(rows) / (streams * fps * seconds)}
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
    raise Failed("the kernel tells no VmRSS")


def search(kind, guess, part, options, store, say):
    """Looks for the largest number of streams that is carried."""
    size, fps = kind
    count, tried = min(max(1, guess), STREAMS_MAX), []
    while count not in tried and len(tried) < options.trials:
        if tried and options.clock.late("L4", part):
            say(f"L4 {size} at {fps} fps: the time is up after {len(tried)} trials")
            return
        tried.append(count)
        result = take(kind, count, options, store, say)
        low, high = bounds(trials(store, kind))
        if result["carried"]:
            # As many as there are cores for, by what these took.
            likely = int(count * 0.95 * CORES / max(result["cores"], 0.05))
            count = max(low + 1, min(likely, low * 3))
        else:
            count = max(1, count * 4 // 5)
        if high is not None and low:
            if high - low <= max(1, low // 12):
                return
            if not low < count < high:
                count = (low + high) // 2
        count = min(count, STREAMS_MAX)


def take(kind, count, options, store, say):
    size, fps = kind
    name = f"L4 {size} {fps} trial {count}"
    result = store.take(name, lambda: trial(
        size, fps, count, options.backends[options.live], options.benches["ghostwatch"]))
    say(f"L4 {size} at {fps} fps, {count} streams: {'carried' if result['carried'] else 'too many'}")
    return result


def trials(store, kind):
    """All of a kind, by the number of streams."""
    size, fps = kind
    found = [it for name, it in store.values.items() if name.startswith(f"L4 {size} {fps} trial ")]
    return sorted(found, key=lambda it: it["streams"])


def bounds(found):
    """The most streams that were carried (0 if none), and the fewest above that were not."""
    low = max((it["streams"] for it in found if it["carried"]), default=0)
    return low, min((it["streams"] for it in found if not it["carried"] and low < it["streams"]), default=None)


def run(options, store, say):
    """Measures what is missing in `store`; the rate that files are labelled at gives the first guess."""
    kinds = [(size, fps) for size in SIZES for fps in options.rates]
    for index, kind in enumerate(kinds):
        size, fps = kind
        speed = store.values.get(f"L3 {size} round 0", {}).get(options.live, 80)
        search(kind, int(speed * 0.85 / fps), (index + 1) / (len(kinds) + 1), options, store, say)
    if GROWTH in kinds:
        for count in options.growth:
            if count < bounds(trials(store, GROWTH))[0] * 3 // 2 + 1 or count == 1:
                take(GROWTH, count, options, store, say)
