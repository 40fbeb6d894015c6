"""From a file to labels: peers, and ghostwatch, each in a process of its own.

    videos.py loop FILE WEIGHTS OUT FRAMES        a peer; writes a line of JSON per frame to OUT
    videos.py pipeline FILE NETWORK OUT           the same with the network as ONNX

`loop` is what most people write: OpenCV decodes, Pillow and torchvision prepare, PyTorch computes
one picture at a time. `pipeline` is what a careful team would: GStreamer decodes and scales on
threads of its own, OpenVINO takes batches of 8, asynchronously, with its throughput hint, and
normalises in the network. Time counts from the first label to the last, as with ghostwatch, so
that nobody's start counts. L2 and L3 of the bench use them (files.py).
"""

import datetime
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

from measure import FOLDER, PYTHON, WEIGHTS, Failed, run

SIDE = 224
BATCH = 8


class Labels:
    """Writes each frame's five best labels, and knows when the first and last were there."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8")
        self.first, self.last, self.frames = None, None, 0

    def add(self, frame, logits):
        import numpy as np

        best = np.argpartition(logits, -5)[-5:]
        best = best[np.argsort(-logits[best])]
        shares = np.exp(logits - logits.max())
        shares = shares[best] / shares.sum()
        top = [{"label_id": int(it), "confidence": float(share)} for it, share in zip(best, shares)]
        self.file.write(json.dumps({"frame": frame, "top": top}) + "\n")
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.frames += 1

    def report(self):
        self.file.close()
        print(json.dumps({"frames": self.frames, "seconds": self.last - self.first}))


def loop(clip, weights, out, frames):
    import cv2
    import torch
    from PIL import Image
    from torchvision import transforms

    import torch_network

    model = torch_network.network(weights, "fp32").network
    prepare = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(SIDE), transforms.ToTensor(),
        transforms.Normalize(torch_network.MEAN, torch_network.STD)])
    labels, video = Labels(out), cv2.VideoCapture(clip)
    with torch.inference_mode():
        model(torch.zeros(1, 3, SIDE, SIDE))
        while labels.frames < int(frames):
            found, frame = video.read()
            if not found:
                break
            picture = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            labels.add(labels.frames, model(prepare(picture)[None])[0].numpy())
    labels.report()


def pipeline(clip, exported, out):
    import gi
    import numpy as np
    import openvino

    gi.require_version("Gst", "1.0")
    gi.require_version("GstApp", "1.0")
    from gi.repository import Gst, GstApp  # noqa: F401

    core = openvino.Core()
    model = core.compile_model(core.read_model(exported), "CPU", {
        "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"})
    labels, queue = Labels(out), openvino.AsyncInferQueue(model)

    def done(request, data):
        # OpenVINO calls this while it holds Python's lock, one at a time.
        first, count = data
        for index, logits in enumerate(request.get_output_tensor(0).data[:count]):
            labels.add(first + index, logits)

    queue.set_callback(done)
    Gst.init(None)
    pipe = Gst.parse_launch(described(clip))
    sink = pipe.get_by_name("out")
    pipe.set_state(Gst.State.PLAYING)
    batch, filled, sent = np.empty((BATCH, SIDE, SIDE, 3), np.uint8), 0, 0
    while True:
        sample = sink.emit("try-pull-sample", Gst.SECOND)
        if sample is None and not sink.get_property("eos"):
            # On a busy machine a frame may take its time.
            error = pipe.get_bus().pop_filtered(Gst.MessageType.ERROR)
            if error is not None:
                sys.exit(f"GStreamer: {error.parse_error()}")
            continue
        if sample is not None:
            buffer = sample.get_buffer()
            taken, view = buffer.map(Gst.MapFlags.READ)
            assert taken
            batch[filled] = np.frombuffer(view.data, np.uint8).reshape(SIDE, SIDE, 3)
            buffer.unmap(view)
            filled += 1
        if filled == BATCH or (sample is None and filled):
            queue.start_async({0: batch}, (sent, filled))
            sent, filled = sent + filled, 0
        if sample is None:
            break
    queue.wait_all()
    pipe.set_state(Gst.State.NULL)
    labels.report()


def described(clip):
    """What Resize(256) and CenterCrop(224) keep, cut out before it is scaled."""
    width, height = size_of(clip)
    side = min(width, height) * SIDE // 256
    left, top = (width - side) // 2, (height - side) // 2
    return (f"filesrc location={clip} ! qtdemux ! h264parse ! avdec_h264 ! queue max-size-buffers=8"
            f" ! videocrop left={left} right={width - side - left} top={top} bottom={height - side - top}"
            f" ! videoscale ! video/x-raw,width={SIDE},height={SIDE} ! videoconvert"
            " ! video/x-raw,format=RGB ! appsink name=out sync=false max-buffers=16")


def size_of(clip):
    text = run(["ffprobe", "-v", "error", "-select_streams", "v", "-show_entries", "stream=width,height",
                "-of", "csv=p=0", clip])
    return tuple(int(it) for it in text.strip().split(","))


LOOP = "Python loop"
PIPELINE = "GStreamer + OpenVINO"


def peer(name, clip, frames):
    """Runs a peer; frames a second, and its first labels. Only the loop ends after `frames`."""
    out = FOLDER / "labels.ndjson"
    kind = {LOOP: ["loop", clip, WEIGHTS, out, frames],
            PIPELINE: ["pipeline", clip, FOLDER / f"network-{BATCH}.onnx", out]}[name]
    report = json.loads(run([PYTHON, __file__, *kind]).splitlines()[-1])
    rows = sorted(map(json.loads, out.read_text(encoding="utf-8").splitlines()), key=lambda it: it["frame"])
    return (report["frames"] - 1) / report["seconds"], [it["top"][0]["label_id"] for it in rows]


def configuration(folder, streams, device, http):
    """A configuration of the daemon with everything in one folder; streams are lines of YAML."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = "\n".join(f"  {name}: {{{fields}}}" for name, fields in streams.items())
    path = folder / "config.yaml"
    path.write_text(f"""version: 1
streams:
{lines}
model: {{weights: "{WEIGHTS}", resize: 256, input: {SIDE}}}
device: {{use: {device}}}
journal: {{path: "{folder}/journal.db", retain: {{bytes: 2GiB, keep_free: 0B}}}}
http: {{listen: "{http}"}}
log: {{level: warn}}
""", encoding="utf-8")
    return path


def events(ghostwatch, config):
    """Every frame's event in the journal."""
    text = run([ghostwatch, "--config", config, "tail", "--from", "earliest", "--format", "ndjson"])
    rows = map(json.loads, text.splitlines())
    return [it["data"] for it in rows if it["type"] == "io.ghostwatch.frame.classified.v1"]


def labelled_at(event):
    """When a frame was handed to the journal, in seconds of the wall clock."""
    ingest = datetime.datetime.fromisoformat(event["ingest_time"].replace("Z", "+00:00"))
    return ingest.timestamp() + event["latency_us"]["total"] / 1e6


def ours(clip, frames, ghostwatch, device):
    """The daemon reads the file once; frames a second, and its first labels."""
    with tempfile.TemporaryDirectory(prefix="ghostwatch-bench.") as folder:
        config = configuration(pathlib.Path(folder) / "it", {"clip": f'url: "{clip}"'}, device, "127.0.0.1:0")
        run([ghostwatch, "--config", config, "run", "--once"])
        rows = sorted(events(ghostwatch, config), key=lambda it: it["frame"])
    if len(rows) != frames:
        raise Failed(f"it labelled {len(rows)} of {frames} frames")
    times = [labelled_at(it) for it in rows]
    return (len(rows) - 1) / (max(times) - min(times)), [it["top"][0]["label_id"] for it in rows]


def decode(clip):
    """Decoding with nothing behind it: milliseconds of one core for the whole file, and seconds."""
    before, start = os.times(), time.perf_counter()
    run(["gst-launch-1.0", "-q", "filesrc", f"location={clip}", "!", "qtdemux", "!", "h264parse",
         "!", "avdec_h264", "max-threads=1", "!", "fakesink", "sync=false"])
    took, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used * 1e3, took


if __name__ == "__main__":
    {"loop": loop, "pipeline": pipeline}[sys.argv[1]](*sys.argv[2:])
