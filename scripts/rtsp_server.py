#!/usr/bin/python3
"""An RTSP server that stands for a camera: it serves the H.264 of a clip, over and over.

    rtsp_server.py CLIP [PORT]

It listens on loopback, prints its address on one line and serves until it is ended. The clip is not
encoded again: its access units are read once and sent again and again with growing timestamps, so
that a client sees one endless stream. Needs Debian's gir1.2-gst-rtsp-server-1.0 and python3-gi.
"""

import signal
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstApp, GstRtspServer  # noqa: E402, F401


def access_units(clip):
    """The clip's access units as (bytes, pts, delta unit), and its length in nanoseconds."""
    pipeline = Gst.parse_launch(
        "filesrc name=file ! qtdemux ! h264parse config-interval=-1"
        " ! video/x-h264,stream-format=byte-stream,alignment=au"
        " ! appsink name=out sync=false max-buffers=8"
    )
    pipeline.get_by_name("file").set_property("location", clip)
    out = pipeline.get_by_name("out")
    pipeline.set_state(Gst.State.PLAYING)
    units, end = [], 0
    while (sample := out.emit("pull-sample")) is not None:
        buffer = sample.get_buffer()
        data = buffer.extract_dup(0, buffer.get_size())
        units.append((data, buffer.pts, buffer.has_flags(Gst.BufferFlags.DELTA_UNIT)))
        end = max(end, buffer.pts + buffer.duration)
    error = pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR)
    pipeline.set_state(Gst.State.NULL)
    if error is not None or not units:
        reason = error.parse_error()[0].message if error else "there is no H.264 video in it"
        sys.exit(f"rtsp_server: cannot read {clip}: {reason}")
    return units, end - min(pts for _, pts, _ in units)


class Loop:
    """Feeds one client session's appsrc with the clip, without end."""

    def __init__(self, units, length):
        self.units = units
        self.length = length
        self.sent = 0

    def need_data(self, source, _bytes):
        turn, index = divmod(self.sent, len(self.units))
        self.sent += 1
        data, pts, delta = self.units[index]
        buffer = Gst.Buffer.new_wrapped(data)
        buffer.pts = pts - self.units[0][1] + turn * self.length
        if delta:
            buffer.set_flags(Gst.BufferFlags.DELTA_UNIT)
        source.emit("push-buffer", buffer)


def serve(clip, port):
    units, length = access_units(clip)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)

    factory = GstRtspServer.RTSPMediaFactory()
    # An appsrc paces nothing: the RTSP server's sinks do, by the timestamps.
    factory.set_launch(
        "( appsrc name=clip format=time max-bytes=1000000"
        " caps=video/x-h264,stream-format=byte-stream,alignment=au"
        " ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=-1 )"
    )

    def configure(_factory, media):
        source = media.get_element().get_by_name_recurse_up("clip")
        source.connect("need-data", Loop(units, length).need_data)

    factory.connect("media-configure", configure)
    factory.set_shared(True)
    server.get_mount_points().add_factory("/clip", factory)
    if not server.attach(None):
        sys.exit(f"rtsp_server: cannot listen on 127.0.0.1:{port}")
    print(f"rtsp://127.0.0.1:{server.get_bound_port()}/clip", flush=True)

    loop = GLib.MainLoop()
    for number in (signal.SIGINT, signal.SIGTERM):
        GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, loop.quit)
    loop.run()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    Gst.init(None)
    serve(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "0")
