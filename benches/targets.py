"""What the bench should show, and whether it did: rows of target, measured, verdict."""

import pathlib
import statistics

import files
import live
import network
import videos
from measure import collected, ratios, series

# By backend: parts of OpenVINO's better hint, times the Python loop and the OpenVINO pipeline.
CPU, NATIVE = "ghostwatch cpu", "ghostwatch native"
LOOP_TIMES = {CPU: 3.0, NATIVE: 6.0}
PIPELINE_TIMES = {CPU: 1.3, NATIVE: 1.6}
BOUND_PART = 0.95
PREPROCESS_MS, PILLOW_TIMES = 0.8, 5.0
ONE_CORE_PART = 0.6
# With 16 streams of 720p, and for each more.
MEMORY_MB, MEMORY_MORE_MB, MEMORY_STREAMS = 600, 25, 16
SLIM_MEMORY_MB = 250
# "Flat until saturation": the median at up to four fifths of the most streams, of that of one stream.
FLAT_PART, FLAT_TIMES = 0.8, 2.0


def row(name, measured, least=None, most=None, unit=""):
    """A target, what was measured, and by how much it was met or missed."""
    bound = f"at least {least}" if most is None else f"at most {most}"
    if measured is None:
        return [f"{name}: {bound}{unit}", "-", "not measured"]
    met = least <= measured if most is None else measured <= most
    away = abs(measured / (least if most is None else most) - 1) * 100
    return [f"{name}: {bound}{unit}", f"{measured:.2f}{unit}",
            f"met, {away:.0f} % to spare" if met else f"**missed by {away:.0f} %**"]


def median(values):
    return statistics.median(values) if values else None


def best(rounds, start):
    """Of a contender's variants the one with the highest median: all are measured, the best counts."""
    names = {name for it in rounds for name in it if name.startswith(start)}
    return max(names, key=lambda it: statistics.median(series(rounds, it)), default=None)


def of_openvino(backend, precision):
    """What part of OpenVINO a backend should reach."""
    if backend == CPU:
        return 0.8
    if precision == "bf16":
        return 1.5
    # The engine's own target is meant for AVX-512; on AVX2 it should be as fast as OpenVINO.
    return 1.7 if " avx512f" in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8") else 1.0


def of_network(store, options):
    lines = []
    for backend in options.backends:
        for precision in network.precisions():
            for batch in options.batches:
                rounds = network.figures(store, network.at(precision, batch))
                mine, other = best(rounds, backend), best(rounds, "OpenVINO")
                value = median(ratios(rounds, mine, other)) if mine and other else None
                lines.append(row(f"{backend}, {precision}, batch {batch}, times OpenVINO's better hint", value,
                                 least=of_openvino(backend, precision)))
    if NATIVE in options.backends:
        rounds = network.figures(store, "L0 one core")
        # A ratio of times: theirs divided by ours in pictures a second.
        value = median(ratios(rounds, "OpenVINO, latency", f"{NATIVE}, 1 lane"))
        lines.append(row(f"{NATIVE}, batch 1 on one core, part of the time of OpenVINO with the latency hint",
                         value, most=ONE_CORE_PART))
    return lines


def of_preprocess(store, _options):
    rounds = collected(store, "L1")
    mine = "1920x1080 ghostwatch I420"
    return [row("1080p I420, one core", median(series(rounds, mine)), most=PREPROCESS_MS, unit=" ms"),
            row("times Pillow (which has its colours converted for nothing)",
                median(ratios(rounds, "1920x1080 Pillow", mine)), least=PILLOW_TIMES)]


def of_files(store, options):
    lines = []
    for backend in options.backends:
        # The engine's targets are for 1080p.
        for size in ["1080p"] if backend == NATIVE else ["1080p", "720p"]:
            rounds = collected(store, f"L3 {size}")
            for name, peer, least in (("the Python loop", videos.LOOP, LOOP_TIMES),
                                      ("the OpenVINO pipeline", videos.PIPELINE, PIPELINE_TIMES)):
                value = None if files.gated(store, backend) else median(ratios(rounds, backend, peer))
                lines.append(row(f"{backend}, {size}, times {name}", value, least=least[backend]))
            lines.append(row(f"{backend}, {size}, of the bound by its parts",
                             median(ratios(rounds, backend, f"{backend}: bound")), least=BOUND_PART))
    return lines


def of_live(store, options):
    found = [it for it in live.trials(store, live.GROWTH) if "rss_mb" in it]
    counts = {it["streams"]: it for it in found}
    carried = [it for it in found if it["carried"]]
    most = max((it["streams"] for it in carried), default=0)
    resident = counts[MEMORY_STREAMS]["rss_mb"] if MEMORY_STREAMS in counts else None
    slim = CPU not in options.backends
    lines = [row(f"resident with {MEMORY_STREAMS} streams of 720p", resident,
                 most=SLIM_MEMORY_MB if slim else MEMORY_MB, unit=" MB"),
             row("each further stream", slope(carried, "rss_mb"), most=MEMORY_MORE_MB, unit=" MB")]
    few = next((it["p50"] for it in carried if it["streams"] == 1), None)
    many = max((it["p50"] for it in carried if it["streams"] <= FLAT_PART * most), default=None)
    flat = many / few if few and many else None
    lines.append(row(f"median latency at up to {FLAT_PART:.0%} of the most streams, times that of one stream",
                     flat, most=FLAT_TIMES))
    return lines


def slope(carried, what):
    """What one more stream costs, by least squares."""
    if len({it["streams"] for it in carried}) < 3:
        return None
    return statistics.linear_regression([it["streams"] for it in carried],
                                        [it[what] for it in carried]).slope


TARGETS = {"L0": of_network, "L1": of_preprocess, "L3": of_files, "L4": of_live}
