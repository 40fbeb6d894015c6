"""What the layers of the bench share: processes with a time limit, clips, a memory of what was
measured, statistics."""

import json
import os
import pathlib
import random
import select
import shlex
import statistics
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "bench"
CACHE = pathlib.Path(os.environ.get("GHOSTWATCH_CACHE") or pathlib.Path(
    os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ghostwatch")
CLIPS = CACHE / "clips"
# Made from those once, by ffmpeg.
MADE = CACHE / "bench"
# The shipped checkpoint is a trained GhostNet 1.0x of 1000 classes. The bench gives it inputs of
# 224x224 like the published one's, which a network without fully connected rows takes as well.
WEIGHTS = ROOT / "weights" / "ghostnet-1x-demo.safetensors"
PYTHON = ROOT / "target" / "peers" / "bin" / "python"
SIDE = 224
CORES = len(os.sched_getaffinity(0))

# Backends of ghostwatch: the name in the results, and `device:` in the configuration. Those that
# the build does not have are left out. Live streams are measured with the last one that it has.
BACKENDS = {
    "ghostwatch cpu": "cpu",
    "ghostwatch native": "native",
}

SIZES = {"1080p": (1920, 1080), "720p": (1280, 720)}
# Made from, and for which sizes: enlarged clips would be easier to decode than a camera's picture,
# so the bitrate is held at what cameras send.
CLIP_OF = {"1080p": ("bigbuckbunny.mp4", "4M"), "720p": ("bigbuckbunny.mp4", "2M")}
CLIP_SECONDS = 20

# Seconds that an order to a worker, or a process that ends by itself, may take on a machine with
# nothing else to do, several times over; `patience` lengthens all limits on a busy one.
LIMIT = 120
patience = 1


class Failed(Exception):
    """Something that is measured did not do what it should; the reason is the text."""


def environment(extra=None):
    """Without a GPU, and without proxies or settings of the caller's Python."""
    mine = {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    kept = {name: it for name, it in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, **mine, **(extra or {})}


def run(command, limit=LIMIT):
    """What a process prints on standard output. What it says on the other goes to a file."""
    command = [str(it) for it in command]
    try:
        done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, errors="replace", timeout=limit * patience)
    except subprocess.TimeoutExpired:
        raise Failed(f"{pathlib.Path(command[0]).name} took longer than {limit * patience} s") from None
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    with open(FOLDER / "workers.log", "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n{done.stderr}")
    if done.returncode:
        said = [it.strip() for it in done.stderr.splitlines() if it.strip()]
        raise Failed(f"it ended with {done.returncode}: {said[-1][:300] if said else 'without a word'}")
    return done.stdout


class Worker:
    """A process that takes orders, one a line, and has loaded what it needs before it is timed."""

    def __init__(self, *command, cores=None):
        with open(FOLDER / "workers.log", "a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [str(it) for it in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, env=environment(),
                preexec_fn=cores and (lambda: os.sched_setaffinity(0, cores)))
        self.alive = True

    def ask(self, order, limit=LIMIT):
        """The answer."""
        answer = ""
        try:
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], limit * patience)[0]:
                self.kill()
                raise Failed(f"no answer to {order!r} in {limit * patience} s")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            self.kill()
            raise Failed(f"it ended at {order!r} with {self.process.returncode}")
        if not answer.startswith("ok"):
            raise Failed(answer.removeprefix("error ").strip())
        return answer.removeprefix("ok").strip()

    def run(self, seconds):
        """Pictures a second, and milliseconds of one core per picture."""
        before = cpu_seconds(self.process.pid)
        count, took = map(float, self.ask(f"run {seconds}").split())
        return {"fps": count / took, "core_ms": (cpu_seconds(self.process.pid) - before) * 1e3 / count}

    def kill(self):
        self.alive = False
        self.process.kill()
        self.process.wait()

    def close(self):
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


def cpu_seconds(pid):
    """User and system time of all threads of a process so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Others:
    """How much of the cores other processes used since it was made: a bench wants none."""

    def __init__(self):
        self.before = self.now()

    def now(self):
        """Seconds of all cores so far: in all, at work, and at work for this process and its ended
        children."""
        text = pathlib.Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        ticks = [int(it) / os.sysconf("SC_CLK_TCK") for it in text.split()[1:9]]
        mine = sum(os.times()[:4])
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], mine

    def share(self):
        total, work, mine = (b - a for a, b in zip(self.before, self.now()))
        return max(0.0, work - mine) / max(total, 1e-9)


def ours(device, pictures, benches, cores=None):
    return Worker(benches["network"], device, WEIGHTS, pictures, cores=cores)


def backends(pictures, benches, say):
    """The backends that the build has."""
    found = {}
    for name, device in BACKENDS.items():
        worker = ours(device, pictures, benches)
        try:
            worker.ask("load 1 fp32 1")
            found[name] = device
        except Failed as error:
            say(f"{name} is not in this build: {error}")
        finally:
            worker.close()
    if not found:
        raise Failed("no backend of ghostwatch runs")
    return found


def build(profile):
    """Builds what is missing; the paths of the Rust benchmarks, and of the daemon."""
    command = ["cargo", "bench", "--locked", "--no-run", "--message-format=json-render-diagnostics",
               "--bench", "network", "--bench", "preprocess", *profile]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = (json.loads(it) for it in text.splitlines() if it.startswith("{"))
    return {it["target"]["name"]: it["executable"] for it in messages if it.get("executable")}


def pictures():
    """Real frames as inputs, all of the clips': 502."""
    path = MADE / "pictures.rgb"
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


def clip(size, fps):
    """A clip of that size and rate as cameras send it: H.264 with a keyframe every two seconds. And
    the number of its frames."""
    path = MADE / f"{size}-{fps}fps-{CLIP_SECONDS}s.mp4"
    if not path.exists():
        (width, height), (source, rate) = SIZES[size], CLIP_OF[size]
        # The source has 25: faster is played faster, as repeated pictures would cost a decoder nothing.
        faster, thinned = (["-r", str(fps)], "") if 25 < fps else ([], f"fps={fps},")
        part = path.with_suffix(".part.mp4")
        subprocess.run(
            ["ffmpeg", "-v", "error", "-y", *faster, "-stream_loop", "-1", "-i", CLIPS / source,
             "-t", str(CLIP_SECONDS), "-an", "-vf", f"{thinned}scale={width}:{height}",
             "-c:v", "libx264", "-preset", "fast", "-bf", "0", "-g", str(2 * fps),
             "-b:v", rate, "-maxrate", rate, "-bufsize", rate, "-pix_fmt", "yuv420p", part], check=True)
        part.rename(path)
    return path, CLIP_SECONDS * fps


class Store:
    """What was measured so far, a line of JSON each, so that a bench that was broken off goes on. A
    round is measured as a whole or again: its figures were taken beside each other."""

    def __init__(self, path, key, fresh):
        self.path = path
        self.values = {} if fresh else kept(path, key)
        self.resumed = len(self.values)
        part = path.with_suffix(".part")
        lines = [{"key": key}, *({"name": name, "value": it} for name, it in self.values.items())]
        part.write_text("".join(json.dumps(it) + "\n" for it in lines), encoding="utf-8")
        part.rename(path)

    def take(self, name, measured):
        if name not in self.values:
            self.put(name, measured())
        return self.values[name]

    def put(self, name, value):
        self.values[name] = value
        self.append({"name": name, "value": value})

    def done(self, layers):
        """These were measured to the end: the next bench measures them again."""
        self.append({"done": layers})

    def append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def kept(path, key):
    """What an earlier bench of the same `key` has measured and not finished."""
    values = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != {"key": key}:
            return {}
        for line in map(json.loads, lines[1:]):
            if "done" in line:
                values = {it: value for it, value in values.items() if it.split()[0] not in line["done"]}
            else:
                values[line["name"]] = line["value"]
    except FileNotFoundError:
        pass
    except json.JSONDecodeError:
        # The last line, if the machine went down while it was written.
        pass
    return values


class Clock:
    """Shares the time between the layers, so that all have their turn: no further round of a layer
    begins once it is later than its part."""

    def __init__(self, minutes, estimates):
        self.begun, self.ends, sofar = time.monotonic(), {}, 0
        scale = minutes * 60 / sum(estimates.values())
        for layer, seconds in estimates.items():
            self.ends[layer] = (sofar * scale, seconds * scale)
            sofar += seconds

    def elapsed(self):
        return time.monotonic() - self.begun

    def late(self, layer, part):
        """Whether more than that part of the layer's share is over."""
        begin, seconds = self.ends[layer]
        return begin + part * seconds < self.elapsed()


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


def collected(store, prefix):
    """Rounds 0, 1, ... that are there."""
    found = []
    while f"{prefix} round {len(found)}" in store.values:
        found.append(store.values[f"{prefix} round {len(found)}"])
    return found


def series(rounds, name):
    return [it[name] for it in rounds if name in it]
