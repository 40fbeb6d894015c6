"""What the bench says: the tables of RESULTS.md between two markers."""

import pathlib
import statistics
import subprocess
import time

import files
import live
import measure
import network
import plots
from measure import ROOT, SIZES, collected, interval, ratios, series
from targets import TARGETS, best, slope

BEGIN, END = "<!-- bench: begin, written by scripts/bench -->", "<!-- bench: end -->"
RESULTS = ROOT / "benches" / "RESULTS.md"
LAYER = "<!-- {} -->"


def rows(header, lines):
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(it) + " |" for it in
                      [header, ["---"] * len(header), *lines]])


def figure(values, digits=1):
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def ratio(values):
    """A median and its interval; a star says that nothing follows, as 1 lies within."""
    if not values:
        return "-"
    median, ends = interval(values)
    if ends is None:
        return f"{median:.2f}"
    return f"{median:.2f} ({ends[0]:.2f}-{ends[1]:.2f})" + ("*" if ends[0] <= 1 <= ends[1] else "")


def network_table(store, options):
    lines = ["Pictures a second by batch size, all cores, medians; the same bytes in, float32 logits "
             "out. \"1 lane\": all cores for one batch; for ghostwatch one core, since a lane has one "
             "thread. Other lanes: as many batches at once. OpenVINO chooses by its hint.", ""]
    for precision in network.precisions():
        by_size = {it: network.figures(store, network.at(precision, it)) for it in options.batches}
        sizes = [it for it, rounds in by_size.items() if rounds]
        names = list(dict.fromkeys(name for it in sizes for one in by_size[it] for name in one))
        names.sort(key=lambda it: (it.startswith("ghostwatch"), it))
        lines += [rows([precision, *(f"batch {it}" for it in sizes)], [
            [name, *(figure(series(by_size[it], name)) for it in sizes)] for name in names]), ""]
        compared = []
        for backend in options.backends:
            for other in network.FAMILIES:
                pairs = [(by_size[it], best(by_size[it], backend), best(by_size[it], other)) for it in sizes]
                if any(mine and theirs for _, mine, theirs in pairs):
                    compared.append([f"{backend} / {other}", *(
                        ratio(ratios(*it)) if it[1] and it[2] else "-" for it in pairs)])
        lines += [rows([f"{precision}, best variant / best variant", *(f"batch {it}" for it in sizes)],
                       compared), ""]
        lines += [cpu_time(store, precision, sizes, names), "", gate_table(store, precision), ""]
    if "bf16" not in network.precisions():
        lines += ["No bf16 rows: this processor has no bf16 instructions, so all would only emulate it.", ""]
    return lines + one_core(store)


def cpu_time(store, precision, sizes, names):
    """Less of it stays the same on a busy machine than in pictures a second."""
    by_size = {it: network.figures(store, network.at(precision, it), "core_ms") for it in sizes}
    return rows([f"{precision}, CPU ms a picture", *(f"batch {it}" for it in sizes)], [
        [name, *(figure(series(by_size[it], name)) for it in sizes)] for name in names])


def one_core(store):
    """Batch 1 with one core for everything."""
    rounds = network.figures(store, "L0 one core")
    if not rounds:
        return []
    theirs = network.ONE_CORE[0]
    return [rows(["fp32, batch 1, one core", "ms", "its time / OpenVINO's"], [
        [name, figure([1e3 / it for it in series(rounds, name)], 2), ratio(ratios(rounds, theirs, name))]
        for name in rounds[0]]), ""]


def gate_table(store, precision):
    lines, count = [], network.GATE_PICTURES
    for name, it in store.values.items():
        if not name.startswith(f"L0 gate {precision} "):
            continue
        who = name.split(maxsplit=3)[3]
        if it.get("failed"):
            lines.append([who, "-", "-", f"did not run: {plain(it['failed'])}"])
        else:
            verdict = "passed" if network.passes(it, precision) else "failed: not timed"
            lines.append([who, f"{it['top1'] * 100:.2f} %", f"{it['error']:.1e}", verdict])
            count = it["pictures"]
    left_out = {}
    for name, it in store.values.items():
        if name.startswith(f"L0 {precision} batch "):
            for who, found in it.items():
                if "failed" in found:
                    left_out[who, name.split(" round")[0].removeprefix("L0 ")] = found["failed"]
    lines += [[who, "-", "-", f"{where}: did not run: {plain(why)}"] for (who, where), why in left_out.items()]
    return rows([f"{precision}, against torch eager fp32 on {count} real frames", "first label agrees",
                 "largest error, of the largest logit", ""], lines)


def plain(reason):
    """A reason that fits into a table."""
    return reason.replace("|", "/").replace(str(ROOT), "")[:160]


def preprocess_table(store, _options):
    rounds = collected(store, "L1")
    lines = []
    for name in sorted({name for it in rounds for name in it}):
        size = name.split()[0]
        lines.append([name, figure(series(rounds, name), 2),
                      ratio(ratios(rounds, name, f"{size} ghostwatch I420"))])
    return ["Milliseconds of one core a frame to 224x224, and how many times ghostwatch's time from "
            "I420 planes that is.", "", rows(["picture and who", "ms", "times ghostwatch"], lines), ""]


def decode_table(store, _options):
    lines = []
    for size in SIZES:
        rounds = collected(store, f"L2 {size}")
        lines.append([size, figure(series(rounds, "core_ms"), 2), figure(series(rounds, "fps"))])
    return ["H.264 at 30 fps (4 Mbit/s at 1080p, 2 Mbit/s at 720p), avdec_h264 with one thread, nothing "
            "behind it.", "", rows(["size", "core-ms a frame", "frames/s on one core"], lines), ""]


def file_table(store, options):
    lines, bounds = [], []
    for size in SIZES:
        rounds = collected(store, f"L3 {size}")
        names = dict.fromkeys(it for one in rounds for it in sorted(one) if files.contender(it))
        for name in names:
            why = files.gated(store, name)
            compared = ["-" if name == it or files.gated(store, it) else ratio(ratios(rounds, it, name))
                        for it in options.backends]
            same, of = series(rounds, f"{name}: same"), series(rounds, f"{name}: compared")
            lines.append([size, name, f"not counted: {why}" if why else figure(series(rounds, name)), *compared,
                          f"{same[0] * 100:.1f} % of {of[0]}" if same else "-"])
        failed = {name.removesuffix(": failed"): it for one in rounds for name, it in one.items()
                  if name.endswith(": failed")}
        lines += [[size, who, f"did not run: {plain(why)}", *("-" for _ in options.backends), "-"]
                  for who, why in failed.items()]
        bounds += [[size, it, figure(series(rounds, "decode core-ms"), 2),
                    figure(series(rounds, "preprocess core-ms"), 2),
                    figure(series(rounds, f"{it}: inference"), 2), figure(series(rounds, f"{it}: bound")),
                    ratio(ratios(rounds, it, f"{it}: bound"))] for it in options.backends]
    return ["Frames a second from a file to label events, from the first label to the last. First labels "
            "are compared with those of the Python loop, which prepares the pictures in another order of "
            "steps (colours, then size) than the others.", "",
            rows(["size", "who", "frames/s", *(f"{it} is faster by" for it in options.backends),
                  "same first label as the loop"], lines), "",
            f"The parts alone, in the same rounds: with decode, preprocess and inference (batch "
            f"{files.INFERENCE_BATCH}, {measure.CORES} lanes) in milliseconds of one core, "
            f"{measure.CORES}000 / their sum would be the frames/s if nothing else cost anything.", "",
            rows(["size", "", "decode", "preprocess", "inference", "bound", "reached of the bound"], bounds), "",
            "Roboflow's `inference` did not run here. Its version 1.8.3 asks for other versions of what the "
            "peers share (ONNX Runtime below 1.22, NumPy below 2.4, PyAV 14.2) and for some sixty packages "
            "more; an environment of its own was not made.", ""]


def live_table(store, options):
    lines = []
    for size in SIZES:
        for rate in options.rates:
            found = live.trials(store, (size, rate))
            low, high = live.bounds(found)
            at = next((it for it in found if it["streams"] == low), None)
            lines.append([size, str(rate), str(low), "not tried" if high is None else str(high)] + (
                [f"{at['p50']:.0f}", f"{at['p99']:.0f}", f"{at['cores']:.2f}", f"{at['rss_mb']:.0f}"]
                if at else ["-"] * 4))
    grown = live.trials(store, live.GROWTH)
    table = [[str(it["streams"]), *(f"{it[what]:.{digits}f}" if what in it else "-" for what, digits in (
        ("cores", 2), ("rss_mb", 0), ("p50", 0), ("p99", 0), ("dropped", 0), ("share", 3))),
        "yes" if it["carried"] else "no"] for it in grown]
    size, rate = live.GROWTH
    more = [it for it in grown if it["carried"]]
    cost = slope(more, "cores")
    cost = [] if cost is None else [f"One more of these streams costs {slope(more, 'rss_mb'):.1f} MB and "
                                    f"{cost * 100:.1f} % of a core.", ""]
    return [f"The most streams with no frame dropped and 99 % labelled within {live.LATENCY_MS} ms of arrival "
            f"(trials of {live.TRIAL:.0f} s, {options.live}; the daemon alone, clips at their own rate), and "
            "the fewest that were too many.", "",
            rows(["size", "fps", "streams", "too many", "p50 ms", "p99 ms", "cores", "resident MB"], lines), "",
            rows([f"{size} at {rate} fps: streams", "cores", "resident MB", "p50 ms", "p99 ms", "dropped",
                  "labelled of what was sent", "carried"], table), "", *cost]


TABLES = {
    "L0": ("The network alone", network_table), "L1": ("Preprocess", preprocess_table),
    "L2": ("Decode", decode_table), "L3": ("File to labels", file_table), "L4": ("Live streams", live_table),
}


def machine():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((it.split(":")[1].strip() for it in text.splitlines() if it.startswith("model name")), "?")
    features = [it for it in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f" {it}" in text]
    return f"{measure.CORES} cores of {model} ({', '.join(features)})"


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"commit {git('rev-parse', '--short', 'HEAD') or '?'}{' with changes' if changed else ''}"


def versions():
    """Of the peers, as they are installed."""
    from importlib import metadata

    names = {"torchvision": "torchvision", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
             "opencv-python-headless": "OpenCV", "pillow": "Pillow", "timm": "timm", "numpy": "NumPy"}
    found = [f"PyTorch {torch_version()}"]
    for package, name in names.items():
        try:
            found.append(f"{name} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name}: not installed")
    text = subprocess.run(["gst-launch-1.0", "--version"], capture_output=True, text=True).stdout
    return ", ".join([*found, *(it for it in text.splitlines() if it.startswith("GStreamer"))])


def torch_version():
    """PyTorch is unpacked without its package's metadata; importing it takes seconds."""
    path = next(measure.PYTHON.parent.parent.glob("lib/python*/site-packages/torch/version.py"), None)
    text = path.read_text(encoding="utf-8") if path else ""
    return next((it.split("'")[1] for it in text.splitlines() if it.startswith("__version__ =")), "?")


def section(layer, store, options):
    title, lines = TABLES[layer]
    about = store.values.get(f"{layer} machine", {})
    when = ". ".join([f"{about.get('date', '?')}, {machine()}, {commit()}, up to {options.rounds} rounds",
                      f"Other programs used {about.get('others', 0) * 100:.0f} % of the cores meanwhile"])
    failed = [f"**Did not run to its end: {plain(about['failed'])}**", ""] if about.get("failed") else []
    try:
        said = lines(store, options)
        wanted = TARGETS[layer](store, options) if layer in TARGETS else []
    except (KeyError, IndexError, ValueError, statistics.StatisticsError) as error:
        said, wanted = [f"No table: {type(error).__name__}: {error}", ""], []
    goals = [rows(["target", "measured", ""], wanted), ""] if wanted else []
    drawn = [f"![{it}](plots/{it}.png)" for it in plots.PLOTS_OF.get(layer, ())]
    return "\n".join([f"### {layer}: {title}", "", when + ".", "", *failed, *goals, *said, *drawn]).rstrip()


def table(store, options):
    """All that was measured now."""
    return "\n\n".join(section(it, store, options) for it in options.layers)


def write(store, options, path):
    """Replaces the layers that were measured in RESULTS.md, and draws their plots."""
    plots.draw(store, options, path.parent / "plots")
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text:
        text = text.rstrip() + f"\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    kept = {}
    for layer in TABLES:
        if LAYER.format(layer) in inside:
            kept[layer] = inside.split(LAYER.format(layer))[1].split("<!-- L")[0].strip()
    kept |= {it: section(it, store, options) for it in options.layers}
    head = ("## Beside its peers\n\nMedians of rounds in which everybody is measured in turn. Ratios are of "
            "figures of the same round, with the 95 % confidence interval of their median (bootstrap); "
            "with a star it includes 1, so nothing follows. Nothing is said of systems that did not run "
            f"here.\n\n{versions()}; {time.strftime('%Y-%m-%d')}.")
    parts = [f"{LAYER.format(it)}\n\n{kept[it]}" for it in TABLES if it in kept]
    inside = "\n\n".join(["", head, *parts, ""])
    path.write_text(f"{before}{BEGIN}{inside}{END}{after}", encoding="utf-8")
