#!/usr/bin/env python3
"""The demo's summary: what became of every frame, and how long it took.

    demo_summary.py metrics URL             the daemon's own account, taken while it runs
    demo_summary.py journal FILE <NDJSON    the summary; FILE is what `metrics` printed
    demo_summary.py sinks FILE <JSON        what became of the events in each sink; standard input is
                                            what `ghostwatch events stats --format json` prints

Everything is counted again from the events: inside an epoch each event carries its frame's number
and the frames that were skipped since the event before, so a frame that is in neither is seen. Ends
with 1 if there is one.
"""

import collections
import datetime
import json
import re
import sys
import urllib.request

FRAME = "io.ghostwatch.frame.classified.v1"
STATE = "io.ghostwatch.stream.state.v1"


class Stream:
    """The account of one stream."""

    def __init__(self):
        self.published = 0
        self.decoded = 0
        self.unaccounted = 0
        self.dropped = collections.Counter()
        self.latency_ms = []
        self.times = []
        self.next_frame = {}  # By epoch: the number that the next frame has.

    def classified(self, data):
        self.published += 1
        self.latency_ms.append(data["latency_us"]["total"] / 1000)
        self.times.append(moment(data["ingest_time"]))
        self.advance(data["epoch"], data["frame"] + 1, data["skipped"], 1)

    def ended(self, data):
        """A state event that ends an epoch carries its last frame and what was skipped at its end."""
        if "epoch" in data:
            self.advance(data["epoch"], data["frame"] + 1, data["skipped"], 0)

    def advance(self, epoch, to, skipped, published):
        new = to - self.next_frame.get(epoch, 0)
        self.next_frame[epoch] = to
        self.decoded += new
        self.dropped.update(skipped)
        self.unaccounted += abs(new - published - sum(skipped.values()))

    def fps(self):
        span = (max(self.times) - min(self.times)).total_seconds() if self.times else 0
        return (self.published - 1) / span if span > 0 else 0.0


def moment(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


def percentile(values, percent):
    """The smallest value that at least so many percent of the values do not exceed."""
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)] if values else 0.0


def read(lines):
    streams = collections.defaultdict(Stream)
    for line in lines:
        event = json.loads(line)
        if event["type"] == FRAME:
            streams[event["subject"]].classified(event["data"])
        elif event["type"] == STATE:
            streams[event["subject"]].ended(event["data"])
    return streams


def show(streams, own):
    row = "{:<10} {:>8} {:>9} {:>8} {:>7} {:>9} {:>9}   {}"
    print(row.format("stream", "decoded", "labelled", "dropped", "fps", "p50", "p99", "dropped by reason"))
    for name, it in sorted(streams.items()):
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(it.dropped.items()))
        print(row.format(
            name, it.decoded, it.published, sum(it.dropped.values()), f"{it.fps():.1f}",
            f"{percentile(it.latency_ms, 50):.1f} ms", f"{percentile(it.latency_ms, 99):.1f} ms",
            reasons or "-"))
    total = sum(it.unaccounted for it in streams.values())
    print(f"unaccounted {total} (counted from the journal; the daemon's own count before it drained: {own})")
    print("fps: labelled frames per second; p50, p99: from a frame's arrival to its hand-over to the journal")
    return total


def own_account(text):
    for line in text.splitlines():
        if line.startswith("ghostwatch_frames_unaccounted "):
            return line.split()[1].removesuffix(".0")
    return "not known"


def errors(text, sink):
    """A sink's failures by their code, as the daemon counted them before it drained."""
    series = re.compile(r'ghostwatch_sink_errors_total\{code="(\w+)",sink="' + re.escape(sink) + r'"\} (\d+)')
    found = [series.fullmatch(line) for line in text.splitlines()]
    return ", ".join(f"{it[1]} {it[2]}" for it in found if it and it[2] != "0") or "none"


def show_sinks(stats, text):
    row = "{:<10} {:>10} {:>8}   {}"
    print()
    print(row.format("sink", "delivered", "behind", "errors"))
    for name, it in sorted(stats["sinks"].items()):
        print(row.format(name, it["cursor"], it["lag"], errors(text, name)))
    print("delivered: events up to the last acknowledged one; behind: events after it, after the drain")


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ("metrics", "journal", "sinks"):
        sys.exit(__doc__)
    if sys.argv[1] == "metrics":
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            print(direct.open(sys.argv[2], timeout=5).read().decode(), end="")
        except OSError as error:
            sys.exit(f"demo: no metrics from {sys.argv[2]}: {error}")
        return
    if sys.argv[1] == "sinks":
        with open(sys.argv[2], encoding="utf-8") as metrics:
            show_sinks(json.load(sys.stdin), metrics.read())
        return
    streams = read(sys.stdin)
    if not streams:
        sys.exit("demo: there is no event in the journal")
    with open(sys.argv[2], encoding="utf-8") as metrics:
        own = own_account(metrics.read())
    print()
    sys.exit(1 if show(streams, own) != 0 else 0)


if __name__ == "__main__":
    main()
