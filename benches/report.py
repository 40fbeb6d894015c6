"""What the bench says: the tables of RESULTS.md between two markers, and the plots."""

import pathlib
import statistics
import subprocess
import time

import measure
import network
from measure import BACKENDS, ROOT, SIZES, interval, ratios

BEGIN, END = "<!-- bench: begin, written by scripts/bench -->", "<!-- bench: end -->"
RESULTS = ROOT / "benches" / "RESULTS.md"
PLOTS = ROOT / "benches" / "plots"
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


def series(rounds, name):
    return [it[name] for it in rounds if name in it]


def best(rounds, start):
    """Of a contender's variants the one with the highest median: all are measured, the best counts."""
    names = {name for it in rounds for name in it if name.startswith(start)}
    return max(names, key=lambda it: statistics.median(series(rounds, it)), default=None)


def network_table(store):
    lines = ["Pictures a second by batch size, both cores, medians; the same bytes in, float32 logits "
             "out. \"1 lane\": both cores for one batch; for ghostwatch one core, since a lane has one "
             "thread. Other lanes: as many batches at once. OpenVINO chooses by its hint.", ""]
    for precision in network.precisions():
        sizes = [it for it in network.BATCHES if network.rounds(store, precision, it)]
        by_size = {it: network.rounds(store, precision, it) for it in sizes}
        names = list(dict.fromkeys(name for it in by_size.values() for one in it for name in one))
        names.sort(key=lambda it: (it.startswith(tuple(BACKENDS)), it))
        lines += [rows([precision, *(f"batch {it}" for it in sizes)], [
            [name, *(figure(series(by_size[it], name)) for it in sizes)] for name in names]), ""]
        compared = []
        for backend in BACKENDS:
            for other in ("torch", "OpenVINO"):
                cells = [ratio(ratios(by_size[it], best(by_size[it], backend), best(by_size[it], other)))
                         if best(by_size[it], backend) and best(by_size[it], other) else "-" for it in sizes]
                compared.append([f"{backend} / best {other}", *cells])
        lines += [rows([f"{precision}, ratio", *(f"batch {it}" for it in sizes)], compared), ""]
        lines += [gate_table(store, precision), ""]
    if "bf16" not in network.precisions():
        lines += ["No bf16 rows: this processor has no bf16 instructions, so all would only emulate it.", ""]
    return lines


def gate_table(store, precision):
    lines = []
    for name, it in store.values.items():
        if not name.startswith(f"L0 gate {precision} "):
            continue
        who = name.split(maxsplit=3)[3]
        if it.get("failed"):
            lines.append([who, "-", "-", f"did not run: {it['failed'][:120]}"])
        else:
            verdict = "passed" if network.passes(it, precision) else "failed: not timed"
            lines.append([who, f"{it['top1'] * 100:.2f} %", f"{it['error']:.1e}", verdict])
    return rows([f"{precision}, against torch eager fp32 on 502 real frames", "first label agrees",
                 "largest error, of the largest logit", ""], lines)


def preprocess_table(store):
    rounds = collected(store, "L1 round")
    names = sorted({name for it in rounds for name in it
                    if name.split()[0] in {f"{w}x{h}" for w, h in SIZES.values()}})
    lines = []
    for name in names:
        size = name.split()[0]
        lines.append([name, figure(series(rounds, name), 2),
                      ratio(ratios(rounds, name, f"{size} ghostwatch I420"))])
    return ["Milliseconds of one core a frame to 224x224, and how many times ghostwatch's time from "
            "I420 planes that is.", "", rows(["picture and who", "ms", "times ghostwatch"], lines), ""]


def decode_table(store):
    lines = []
    for size in SIZES:
        rounds = collected(store, f"L2 {size} round")
        lines.append([size, figure(series(rounds, "core_ms"), 2), figure(series(rounds, "fps"))])
    return ["H.264 at 30 fps (4 Mbit/s at 1080p, 2 Mbit/s at 720p), avdec_h264 with one thread, nothing "
            "behind it.", "", rows(["size", "core-ms a frame", "frames/s on one core"], lines), ""]


def file_table(store):
    lines, parts = [], []
    for size in SIZES:
        rounds = collected(store, f"L3 {size} round")
        for name in dict.fromkeys(it for one in rounds for it in one if ":" not in it and "core-ms" not in it):
            compared = ["-" if name == it else ratio(ratios(rounds, it, name)) for it in BACKENDS]
            lines.append([size, name, figure(series(rounds, name)), *compared])
        for backend in BACKENDS:
            same = series(rounds, f"{backend}: same first label as the Python loop")
            parts.append([
                size, backend, figure(series(rounds, "decode core-ms"), 2),
                figure(series(rounds, "preprocess core-ms"), 2),
                figure(series(rounds, f"{backend}: inference core-ms"), 2),
                figure(series(rounds, f"{backend}: bound")),
                ratio(ratios(rounds, backend, f"{backend}: bound")),
                f"{statistics.median(same) * 100:.1f} %" if same else "-"])
    return ["Frames a second from a file to label events, from the first label to the last.", "",
            rows(["size", "who", "frames/s", *(f"{it} is faster by" for it in BACKENDS)], lines), "",
            f"The parts alone, in the same rounds: with decode, preprocess and inference (batch 8, "
            f"{measure.CORES} lanes) in milliseconds of one core, {measure.CORES}000 / their sum would "
            "be the frames/s if nothing else cost anything.", "",
            rows(["size", "", "decode", "preprocess", "inference", "bound", "reached of the bound",
                  "same first label as the Python loop"], parts), "",
            "Roboflow's `inference` did not run here. Its version 1.8.3 asks for other versions of what the "
            "peers share (ONNX Runtime below 1.22, NumPy below 2.4, PyAV 14.2) and for some sixty packages "
            "more; an environment of its own was not made.", ""]


def live_table(store):
    lines = []
    for size in SIZES:
        for rate in (5, 15, 30):
            found = store.values.get(f"L4 {size} {rate}")
            if not found:
                continue
            at = next((it for it in found["trials"] if it["streams"] == found["most"]), None)
            lines.append([size, str(rate), str(found["most"])] + (
                [f"{at['p50']:.0f}", f"{at['p99']:.0f}", f"{at['cores']:.2f}", f"{at['rss_mb']:.0f}"]
                if at else ["-"] * 4))
    grown = growth(store)
    table = [[str(it["streams"]), f"{it['cores']:.2f}", f"{it['rss_mb']:.0f}", f"{it.get('p50', 0):.0f}",
              f"{it.get('p99', 0):.0f}", str(it["dropped"]), "yes" if it["carried"] else "no"] for it in grown]
    return ["The most streams with no frame dropped and 99 % labelled within 200 ms of arrival "
            "(trials of 8 s; the daemon alone, clips at their own rate).", "",
            rows(["size", "fps", "streams", "p50 ms", "p99 ms", "cores", "resident MB"], lines), "",
            rows(["720p at 5 fps: streams", "cores", "resident MB", "p50 ms", "p99 ms", "dropped", "carried"],
                 table), "", *slope(grown)]


def slope(grown):
    """What one more stream costs, by least squares over those that were carried."""
    carried = [it for it in grown if it["carried"]]
    if len(carried) < 3:
        return []
    counts = [it["streams"] for it in carried]
    memory = statistics.linear_regression(counts, [it["rss_mb"] for it in carried]).slope
    cores = statistics.linear_regression(counts, [it["cores"] for it in carried]).slope
    return [f"One more of these streams costs {memory:.1f} MB and {cores * 100:.1f} % of a core.", ""]


def collected(store, prefix):
    found = []
    while f"{prefix} {len(found)}" in store.values:
        found.append(store.values[f"{prefix} {len(found)}"])
    return found


def growth(store):
    found = [it for name, it in store.values.items() if name.startswith("L4 growth ")]
    return sorted(found, key=lambda it: it["streams"])


TABLES = {
    "L0": ("The network alone", network_table), "L1": ("Preprocess", preprocess_table),
    "L2": ("Decode", decode_table), "L3": ("File to labels", file_table), "L4": ("Live streams", live_table),
}


def machine():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((it.split(":")[1].strip() for it in text.splitlines() if it.startswith("model name")), "?")
    features = [it for it in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f" {it}" in text]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{measure.CORES} cores of {model} ({', '.join(features)}), commit {commit.stdout.strip()}"


def section(layer, store, options):
    title, lines = TABLES[layer]
    load = pathlib.Path("/proc/loadavg").read_text(encoding="ascii").split()[1]
    when = f"{time.strftime('%Y-%m-%d')}, {machine()}, {options.rounds} rounds, load {load} at the end"
    plots = [f"![{it}](plots/{it}.png)" for it in PLOTS_OF.get(layer, ())]
    return "\n".join([f"### {layer}: {title}", "", when + ".", "", *lines(store), *plots]).rstrip()


def table(store, options):
    """All that was measured now."""
    return "\n\n".join(section(it, store, options) for it in options.layers)


def write(store, options):
    """Replaces the layers that were measured in RESULTS.md, and draws their plots."""
    draw(store, options)
    text = RESULTS.read_text(encoding="utf-8")
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
            "here.")
    parts = [f"{LAYER.format(it)}\n\n{kept[it]}" for it in TABLES if it in kept]
    inside = "\n\n".join(["", head, *parts, ""])
    RESULTS.write_text(f"{before}{BEGIN}{inside}{END}{after}", encoding="utf-8")


PLOTS_OF = {"L0": ["network"], "L3": ["files"], "L4": ["live"]}


def draw(store, options):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    PLOTS.mkdir(exist_ok=True)
    for layer in options.layers:
        for name in PLOTS_OF.get(layer, ()):
            drawing = DRAWINGS[name](pyplot, store)
            drawing.tight_layout()
            drawing.savefig(PLOTS / f"{name}.png", dpi=70, metadata={"Software": None})
            pyplot.close(drawing)


def draw_network(pyplot, store):
    drawing, axes = pyplot.subplots(figsize=(8, 5))
    sizes = [it for it in network.BATCHES if network.rounds(store, "fp32", it)]
    names = {name for it in sizes for one in network.rounds(store, "fp32", it) for name in one}
    for name in sorted(names):
        values = [statistics.median(series(network.rounds(store, "fp32", it), name)) for it in sizes]
        ours = name.startswith(tuple(BACKENDS))
        axes.plot(sizes, values, marker="o", label=name, linewidth=3 if ours else 1)
    axes.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="batch", ylabel="pictures/s",
             ylim=(0, None), title="The network alone, float32")
    axes.minorticks_off()
    axes.legend(fontsize=7)
    return drawing


def draw_files(pyplot, store):
    drawing, all_axes = pyplot.subplots(1, len(SIZES), figsize=(8, 3))
    for axes, size in zip(all_axes, SIZES):
        rounds = collected(store, f"L3 {size} round")
        names = [it for it in rounds[0] if ":" not in it and "core-ms" not in it]
        axes.barh(names, [statistics.median(series(rounds, it)) for it in names])
        axes.set(xlabel="frames/s", title=f"{size} file to labels")
    return drawing


def draw_live(pyplot, store):
    drawing, (cores, memory, latency) = pyplot.subplots(1, 3, figsize=(10, 3))
    grown = growth(store)
    counts = [it["streams"] for it in grown]
    cores.plot(counts, [it["cores"] for it in grown], marker="o")
    cores.set(xlabel="streams", ylabel="cores", ylim=(0, None), title="720p at 5 fps")
    memory.plot(counts, [it["rss_mb"] for it in grown], marker="o")
    memory.set(xlabel="streams", ylabel="resident MB", ylim=(0, None))
    for key in ("p50", "p99"):
        latency.plot(counts, [it.get(key, 0) for it in grown], marker="o", label=key)
    latency.set(xlabel="streams", ylabel="arrival to event, ms", ylim=(0, None))
    latency.legend()
    return drawing


DRAWINGS = {"network": draw_network, "files": draw_files, "live": draw_live}
