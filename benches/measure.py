"""What the layers of the bench share: workers, clips, a memory of what was measured, statistics."""

import json
import os
import pathlib
import random
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "bench"
CACHE = pathlib.Path(os.environ.get("GHOSTWATCH_CACHE") or pathlib.Path(
    os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ghostwatch")
CLIPS = CACHE / "clips"
# The shipped checkpoint is a trained GhostNet 1.0x of 1000 classes. The bench gives it inputs of
# 224x224 like the published one's, which a network without fully connected rows takes as well.
WEIGHTS = ROOT / "weights" / "ghostnet-1x-demo.safetensors"
PYTHON = ROOT / "target" / "peers" / "bin" / "python"
GHOSTWATCH = ROOT / "target" / "release" / "ghostwatch"
SIDE = 224
CORES = len(os.sched_getaffinity(0))

# Backends of ghostwatch: the name in the results, and `device:` in the configuration. One line each.
BACKENDS = {
    "ghostwatch": "cpu",
}
# The one that live streams are measured with.
LIVE = "ghostwatch"

SIZES = {"1080p": (1920, 1080), "720p": (1280, 720)}
# Made from, and for which sizes: enlarged clips would be easier to decode than a camera's picture,
# so the bitrate is held at what cameras send.
CLIP_OF = {"1080p": ("bigbuckbunny.mp4", "4M"), "720p": ("bigbuckbunny.mp4", "2M")}


class Failed(Exception):
    """A worker said no."""


def environment(extra=None):
    """Without a GPU, and without proxies or settings of the caller's Python."""
    mine = {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            "PYTHONWARNINGS": "ignore"}
    kept = {name: it for name, it in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, **mine, **(extra or {})}


class Worker:
    """A process that takes orders, one a line, and has loaded what it needs before it is timed."""

    def __init__(self, *command):
        log = FOLDER / "workers.log"
        with open(log, "a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [str(it) for it in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, env=environment())

    def ask(self, order):
        """The words of the answer."""
        try:
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.startswith("ok"):
            raise Failed(answer.removeprefix("error ").strip() or "it ended")
        return answer.split()[1:]

    def run(self, seconds):
        """Pictures a second, and milliseconds of one core per picture."""
        before = cpu_seconds(self.process.pid)
        count, took = map(float, self.ask(f"run {seconds}"))
        return {"fps": count / took, "core_ms": (cpu_seconds(self.process.pid) - before) * 1e3 / count}

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def cpu_seconds(pid):
    """User and system time of all threads of a process so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ours(device, pictures, benches):
    return Worker(benches["network"], device, WEIGHTS, pictures)


def benches():
    """Paths of the Rust benchmarks, built if need be."""
    command = ["cargo", "bench", "--locked", "--no-run", "--message-format=json-render-diagnostics",
               "--bench", "network", "--bench", "preprocess"]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = (json.loads(it) for it in text.splitlines() if it.startswith("{"))
    return {it["target"]["name"]: it["executable"] for it in messages if it.get("executable")}


def pictures():
    """Real frames as inputs, all of the clips': 502."""
    path = FOLDER / "pictures.rgb"
    if not path.exists():
        part = path.with_suffix(".part")
        with open(part, "wb") as out:
            for clip in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"):
                subprocess.run(
                    ["ffmpeg", "-v", "error", "-i", CLIPS / clip, "-vf",
                     "scale=256:256:force_original_aspect_ratio=increase:flags=bilinear,crop=224:224",
                     "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, stdout=out)
        part.rename(path)
    return path


def clip(size, fps, seconds):
    """A clip of that size and rate as cameras send it: H.264 with a keyframe every two seconds. And
    the number of its frames."""
    path = FOLDER / f"{size}-{fps}fps-{seconds}s.mp4"
    if not path.exists():
        (width, height), (source, rate) = SIZES[size], CLIP_OF[size]
        # The source has 25: faster is played faster, as repeated pictures would cost a decoder nothing.
        faster, thinned = (["-r", str(fps)], "") if 25 < fps else ([], f"fps={fps},")
        part = path.with_suffix(".part.mp4")
        subprocess.run(
            ["ffmpeg", "-v", "error", "-y", *faster, "-stream_loop", "-1", "-i", CLIPS / source,
             "-t", str(seconds), "-an", "-vf", f"{thinned}scale={width}:{height}",
             "-c:v", "libx264", "-preset", "fast", "-bf", "0", "-g", str(2 * fps),
             "-b:v", rate, "-maxrate", rate, "-bufsize", rate, "-pix_fmt", "yuv420p", part], check=True)
        part.rename(path)
    return path, seconds * fps


class Store:
    """What was measured so far, so that a bench that was broken off goes on. A round is measured as
    a whole or again: its figures were taken beside each other."""

    def __init__(self, key, fresh):
        self.path = FOLDER / "state.json"
        self.values, self.key = {}, key
        if self.path.exists() and not fresh:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            if state["key"] == key and not state["done"]:
                self.values = state["values"]

    def take(self, name, measure):
        if name not in self.values:
            self.values[name] = measure()
            self.save(False)
        return self.values[name]

    def save(self, done):
        part = self.path.with_suffix(".part")
        text = json.dumps({"key": self.key, "done": done, "values": self.values}, indent=1)
        part.write_text(text, encoding="utf-8")
        part.rename(self.path)


def interval(values, draws=2000):
    """The median, and the 95 % confidence interval of it by bootstrap over the rounds."""
    if len(values) < 2:
        return statistics.median(values), None
    dice = random.Random(1)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    return statistics.median(values), (medians[draws // 40], medians[-draws // 40 - 1])


def ratios(rounds, first, second):
    """One figure's ratio to another of the same round, over the rounds that have both."""
    return [it[first] / it[second] for it in rounds if first in it and second in it]
