"""The plots beside RESULTS.md."""

import statistics

import files
import live
import network
from measure import SIZES, collected, series

PLOTS_OF = {"L0": ["network"], "L1": ["preprocess"], "L3": ["files"], "L4": ["live"]}


def draw(store, options, folder):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for layer in options.layers:
        for name in PLOTS_OF.get(layer, ()):
            drawing = DRAWINGS[name](pyplot, store, options)
            drawing.tight_layout()
            drawing.savefig(folder / f"{name}.png", dpi=80, metadata={"Software": None})
            pyplot.close(drawing)


def ours(name):
    return name.startswith("ghostwatch")


def draw_network(pyplot, store, options):
    drawing, axes = pyplot.subplots(figsize=(9, 5.5))
    by_size = {it: network.figures(store, network.at("fp32", it)) for it in options.batches}
    by_size = {it: rounds for it, rounds in by_size.items() if rounds}
    names = dict.fromkeys(name for rounds in by_size.values() for one in rounds for name in one)
    for name in sorted(names):
        points = [(it, statistics.median(series(rounds, name))) for it, rounds in by_size.items()
                  if series(rounds, name)]
        axes.plot(*zip(*points), marker="o", label=name, linewidth=3 if ours(name) else 1,
                  linestyle="-" if ours(name) else "--")
    sizes = list(by_size)
    axes.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="batch", ylabel="pictures/s",
             ylim=(0, None), title="The network alone, float32, all cores")
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def bars(axes, names, values, xlabel, title):
    axes.barh(names, values, color=["tab:blue" if "ghostwatch" in it else "tab:gray" for it in names])
    for at, value in enumerate(values):
        axes.text(value, at, f" {value:.3g}", va="center", fontsize=8)
    axes.set(xlabel=xlabel, title=title)
    axes.margins(x=0.18)
    axes.invert_yaxis()


def draw_preprocess(pyplot, store, _options):
    drawing, axes = pyplot.subplots(figsize=(8, 3.5))
    rounds = collected(store, "L1")
    values = {name.removeprefix("1920x1080 "): statistics.median(series(rounds, name))
              for name in (rounds[0] if rounds else {}) if name.startswith("1920x1080")}
    names = sorted(values, key=values.get)
    bars(axes, names, [values[it] for it in names], "ms of one core a frame", "1080p to 224x224")
    return drawing


def draw_files(pyplot, store, _options):
    drawing, all_axes = pyplot.subplots(len(SIZES), 1, figsize=(8, 4.5))
    for axes, size in zip(all_axes, SIZES):
        rounds = collected(store, f"L3 {size}")
        names = list(dict.fromkeys(it for one in rounds for it in sorted(one) if files.contender(it)))
        bars(axes, names, [statistics.median(series(rounds, it)) for it in names], "frames/s",
             f"{size} H.264 file to labels")
    return drawing


def draw_live(pyplot, store, options):
    drawing, (cores, memory, latency) = pyplot.subplots(1, 3, figsize=(12, 4))
    for kind in ((size, fps) for size in SIZES for fps in options.rates):
        found = [it for it in live.trials(store, kind) if "p99" in it]
        counts, label = [it["streams"] for it in found], f"{kind[0]}, {kind[1]} fps"
        cores.plot(counts, [it["cores"] for it in found], marker="o", label=label)
        memory.plot(counts, [it["rss_mb"] for it in found], marker="o", label=label)
        latency.plot(counts, [it["p99"] for it in found], marker="o", label=label)
    cores.set(xlabel="streams", ylabel="cores", ylim=(0, None), title="CPU")
    memory.set(xlabel="streams", ylabel="resident MB", ylim=(0, None), title="memory")
    latency.set(xlabel="streams", ylabel="arrival to event, ms", yscale="log", title="latency, p99")
    latency.axhline(live.LATENCY_MS, color="black", linewidth=0.8, linestyle=":")
    cores.legend(fontsize=7)
    return drawing


DRAWINGS = {"network": draw_network, "preprocess": draw_preprocess, "files": draw_files, "live": draw_live}
