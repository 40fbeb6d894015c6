//! Puts the elements of one connection together.
//!
//! ```text
//! file:  filesrc ─ parsebin ─────────────┐
//! http:  souphttpsrc ─ parsebin ─────────┤
//! rtsp:  rtspsrc ─ queue ─ depay ─ parse ┼─ decoder ─ videoconvert ─ appsink
//! test:  videotestsrc ───────────────────┘            (does nothing for the formats that we read)
//! ```
//! What is left of `decoder` is linked when the stream says what it is. Decoders of devices, where they
//! are asked for, bring their pictures into memory themselves, as preprocess reads them there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use gstreamer::{self as gst, prelude::*};
use gstreamer_app as gst_app;
use gstreamer_rtsp::rtsp_message::RTSPMessage;
use gstreamer_video as gst_video;

use crate::{
    frame::Code,
    secret::Secret,
    source::{
        SourceError, Spec,
        facts::Carried,
        gst::{caps, damage, decoders, rtcp, shared::Shared, thin, tls},
        url::{Pattern, Remote, SourceUrl, Transport},
    },
};

/// Packets of a live stream that may wait for the decoder, by their time and size.
const BACKLOG_MAX: Duration = Duration::from_secs(1);
const BACKLOG_BYTES_MAX: u32 = 32 << 20;

/// Requests that are sent again with an answer to the camera's challenge.
const ANSWERS_MAX: u32 = 1;

/// A camera that has not given a stream after so many requests sends us from one address to the
/// next; rtspsrc would follow for ever, a thousand times a second.
const REQUESTS_MAX: u32 = 200;

const PARSED_JPEG: &str = "image/jpeg,parsed=true";

/// How RTP carries a codec: its name in RTP, the elements that take it out, the codec's caps.
const RTP: [(&str, &str, Option<&str>, &str); 6] = [
    ("H264", "rtph264depay", Some("h264parse"), "video/x-h264"),
    ("H265", "rtph265depay", Some("h265parse"), "video/x-h265"),
    ("JPEG", "rtpjpegdepay", Some("jpegparse"), PARSED_JPEG),
    ("MP4V-ES", "rtpmp4vdepay", Some("mpeg4videoparse"), "video/mpeg,mpegversion=4"),
    ("VP8", "rtpvp8depay", None, "video/x-vp8"),
    ("VP9", "rtpvp9depay", None, "video/x-vp9"),
];

/// Builds the pipeline for `spec`, not yet started, and its end.
///
/// # Errors
/// A plugin is missing, or an option is not accepted.
pub fn build(
    spec: &Spec,
    shared: &Arc<Shared>,
) -> Result<(gst::Pipeline, gst_app::AppSink), SourceError> {
    let pipeline = shared.pipeline();
    let convert = make("videoconvert")?;
    let sink = appsink(spec);
    add(&pipeline, &[&convert, sink.upcast_ref()])?;
    link(&convert, sink.upcast_ref())?;
    let tail = Tail {
        pipeline: pipeline.downgrade(),
        convert,
        spec: spec.clone(),
        shared: shared.clone(),
    };
    match &spec.url {
        SourceUrl::File(path) => {
            let source = make("filesrc")?;
            source.set_property("location", path.as_os_str().to_string_lossy().as_ref());
            demux(&pipeline, source, tail)?;
        }
        SourceUrl::Http(remote) => demux(&pipeline, http(remote, spec)?, tail)?,
        SourceUrl::Rtsp(remote) => rtsp(&pipeline, remote, tail)?,
        SourceUrl::Test(pattern) => test(&pipeline, pattern, &tail)?,
    }
    Ok((pipeline, sink))
}

/// Where a video stream is linked to once it is known.
struct Tail {
    /// Weak: the pipeline's own callbacks hold this.
    pipeline: gst::glib::WeakRef<gst::Pipeline>,
    convert: gst::Element,
    spec: Spec,
    shared: Arc<Shared>,
}

impl Tail {
    /// Links an encoded or raw video pad; leaves other pads alone.
    fn attach(&self, pad: &gst::Pad) -> Result<(), SourceError> {
        let Some(pipeline) = self.pipeline.upgrade() else { return Ok(()) };
        let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
        let name = caps.structure(0).map_or("", |it| it.name().as_str());
        let video = name.starts_with("video/") || name.starts_with("image/");
        if !video || !self.shared.link() {
            return Ok(());
        }
        watch_arrival(pad, &self.shared);
        if name == "image/jpeg" && caps.structure(0).is_some_and(|it| !it.has_field("parsed")) {
            return self.attach_jpeg(&pipeline, pad);
        }
        watch_data(pad, &self.shared, self.spec.limits);
        if self.shared.failed() { Ok(()) } else { self.decode(&pipeline, pad, &caps) }
    }

    /// Links the JPEG pictures of a multipart stream, as cameras send them over HTTP. parsebin
    /// hands them on as they are, but avdec_mjpeg takes parsed ones only; and the sizes are in
    /// the caps only after the parser.
    fn attach_jpeg(&self, pipeline: &gst::Pipeline, pad: &gst::Pad) -> Result<(), SourceError> {
        let parse = make("jpegparse")?;
        add(pipeline, &[&parse])?;
        let output = parse.static_pad("src").expect("a parser has a src pad");
        watch_data(&output, &self.shared, self.spec.limits);
        let caps = PARSED_JPEG.parse::<gst::Caps>().expect("the caps are valid");
        self.decode(pipeline, &output, &caps)?;
        sync(&parse)?;
        let input = parse.static_pad("sink").expect("a parser has a sink pad");
        pad.link(&input).map(drop).map_err(|it| broken(format!("linking {PARSED_JPEG}: {it}")))
    }

    /// Links `pad`, which gives `caps`, through a decoder if it needs one.
    fn decode(
        &self,
        pipeline: &gst::Pipeline,
        pad: &gst::Pad,
        caps: &gst::Caps,
    ) -> Result<(), SourceError> {
        let raw = caps.structure(0).is_some_and(|it| it.name() == "video/x-raw");
        let first = if raw { self.convert.clone() } else { self.decoder(caps)? };
        if !raw {
            thin::watch(pad, &self.shared);
            add(pipeline, &[&first])?;
            link(&first, &self.convert)?;
            sync(&first)?;
        }
        let input = first.static_pad("sink").expect("decoders and videoconvert have a sink pad");
        damage::watch(&input, &self.shared);
        pad.link(&input).map(drop).map_err(|it| broken(format!("linking {caps}: {it}")))
    }

    fn decoder(&self, caps: &gst::Caps) -> Result<gst::Element, SourceError> {
        let Some(chosen) =
            decoders::choose(caps, self.spec.decode, self.shared.failed_device.as_deref())
        else {
            let name = caps.structure(0).map_or("?", |it| it.name().as_str());
            let detail = format!("no decoder for {name}; is gstreamer1.0-libav installed?");
            return Err(SourceError { code: Code::Codec, detail });
        };
        let decoder = make(&chosen.name)?;
        self.shared.stream.set_decoder(&chosen.name, &chosen.why);
        self.shared.facts().decoder = Some(chosen);
        self.set_up(&decoder);
        Ok(decoder)
    }

    /// Sets what the decoder has of our wishes; each library names them differently.
    fn set_up(&self, decoder: &gst::Element) {
        let threads = self.spec.decode_threads.max(1).to_string();
        set(decoder, "max-threads", &threads);
        set(decoder, "n-threads", &threads);
        set(decoder, "threads", &threads);
        // Threads by picture hold back a picture each.
        if self.spec.url.is_live() {
            set(decoder, "thread-type", "slice");
        }
        // What is broken is dropped where it is counted, or labelled where that is wanted.
        set(decoder, "output-corrupt", "true");
        set(decoder, "discard-corrupted-frames", "false");
        set(decoder, "max-errors", "-1");
        set(decoder, "qos", "false");
    }
}

fn appsink(spec: &Spec) -> gst_app::AppSink {
    let caps = gst::Caps::builder("video/x-raw").field("format", gst::List::new(caps::FORMATS));
    let sink = gst_app::AppSink::builder()
        .caps(&caps.build())
        .sync(spec.realtime && !spec.url.is_live())
        .max_buffers(if spec.url.is_live() { 2 } else { 4 })
        // The reader takes every picture at once; what is dropped is dropped where it is counted.
        .drop(false)
        .enable_last_sample(false)
        .qos(false)
        .build();
    // Without this answer decoders copy every picture into rows without padding. From 1.24 on the
    // appsink has a callback for it.
    let pad = sink.static_pad("sink").expect("an appsink has a sink pad");
    pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, |_, info| {
        let Some(gst::QueryViewMut::Allocation(query)) = info.query_mut().map(|it| it.view_mut())
        else {
            return gst::PadProbeReturn::Ok;
        };
        query.add_allocation_meta::<gst_video::VideoMeta>(None);
        gst::PadProbeReturn::Handled
    });
    sink
}

/// `source ! parsebin`, whose first video pad is linked to the tail.
fn demux(pipeline: &gst::Pipeline, source: gst::Element, tail: Tail) -> Result<(), SourceError> {
    let parse = make("parsebin")?;
    add(pipeline, &[&source, &parse])?;
    link(&source, &parse)?;
    parse.connect_pad_added(move |_, pad| {
        if let Err(error) = tail.attach(pad) {
            tail.shared.fail(error.code, error.detail);
        }
    });
    Ok(())
}

fn http(remote: &Remote, spec: &Spec) -> Result<gst::Element, SourceError> {
    let source = make("souphttpsrc")?;
    source.set_property("location", remote.location("http").expose());
    source.set_property("do-timestamp", true);
    source.set_property("timeout", 10_u32);
    source.set_property("ssl-strict", spec.tls.verify);
    if remote.tls {
        tls::set_up(&source, &spec.tls)?;
    }
    credentials(&source, spec);
    Ok(source)
}

fn rtsp(pipeline: &gst::Pipeline, remote: &Remote, tail: Tail) -> Result<(), SourceError> {
    let source = make("rtspsrc")?;
    let spec = &tail.spec;
    // Without user name and password: rtspsrc puts the location into its messages.
    source.set_property("location", remote.location("rtsp").expose());
    credentials(&source, spec);
    source.set_property_from_str(
        "protocols",
        match spec.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
            Transport::Auto => "udp+tcp",
        },
    );
    source.set_property("latency", u32::try_from(spec.latency.as_millis()).unwrap_or(u32::MAX));
    // With it a burst longer than `latency`, and each connection begins with one, would throw away
    // the oldest packets: the keyframe. See `backlog`.
    source.set_property("drop-on-latency", false);
    source.set_property("tcp-timeout", 5_000_000_u64);
    source.set_property("teardown-timeout", 500_000_000_u64);
    source.set_property("do-rtsp-keep-alive", true);
    source.set_property("add-reference-timestamp-meta", true);
    if !spec.tls.verify {
        source.set_property("tls-validation-flags", gio::TlsCertificateFlags::empty());
    }
    if remote.tls {
        tls::set_up(&source, &spec.tls)?;
    }
    if let Some(fingerprint) = spec.tls.fingerprint {
        tls::pin(&source, fingerprint, &tail.shared);
    }
    bound(&source, tail.shared.clone());
    rtcp::listen(&source, &tail.shared);
    let shared = tail.shared.clone();
    source.connect("select-stream", false, move |values| {
        shared.describe();
        let caps = values.get(2).and_then(|it| it.get::<gst::Caps>().ok());
        let media = caps.as_ref().and_then(|it| it.structure(0)?.get::<String>("media").ok());
        Some((media.as_deref() == Some("video")).to_value())
    });
    add(pipeline, &[&source])?;
    source.connect_pad_added(move |_, pad| {
        if let Err(error) = depayload(&tail, pad) {
            tail.shared.fail(error.code, error.detail);
        }
    });
    Ok(())
}

/// Bounds what rtspsrc asks of a server: not without end, as where one redirects in circles; and no
/// password a third time that was refused, as rtspsrc would seven times and cameras lock accounts
/// after fewer. A request that comes by with an answer to the challenge was sent with it before. Once
/// is in order, as a nonce may have grown old; and so is all after the streams are described.
fn bound(source: &gst::Element, shared: Arc<Shared>) {
    let (requests, again) = (AtomicU32::new(0), AtomicU32::new(0));
    source.connect("before-send", false, move |values| {
        let message = values.get(1).and_then(|it| it.get::<RTSPMessage>().ok());
        let answered = message.is_some_and(|it| !it.parse_auth_credentials().is_empty());
        let refused =
            answered && !shared.is_described() && ANSWERS_MAX <= again.fetch_add(1, Relaxed);
        let endless = !shared.is_linked() && REQUESTS_MAX <= requests.fetch_add(1, Relaxed);
        if endless {
            shared.fail(Code::Error, format!("no stream after {REQUESTS_MAX} requests"));
        }
        Some((!endless && !refused).to_value())
    });
}

/// Takes the codec's data out of RTP and links it to a decoder.
fn depayload(tail: &Tail, pad: &gst::Pad) -> Result<(), SourceError> {
    let Some(pipeline) = tail.pipeline.upgrade() else { return Ok(()) };
    let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
    let field = |name| caps.structure(0).and_then(|it| it.get::<String>(name).ok());
    if field("media").as_deref() != Some("video") || !tail.shared.link() {
        return Ok(());
    }
    let codec = field("encoding-name").unwrap_or_default();
    let Some((_, depay, parse, caps)) = RTP.iter().find(|it| it.0 == codec) else {
        let detail = format!("the camera sends {codec}, which is not supported");
        return Err(SourceError { code: Code::Codec, detail });
    };
    {
        let mut facts = tail.shared.facts();
        let udp = pipeline.iterate_all_by_element_factory_name("udpsrc").into_iter().next();
        facts.carried = Some(if udp.is_some() { Carried::Udp } else { Carried::Tcp });
        facts.server = field("a-tool");
        facts.announced_fps = field("a-framerate").and_then(|it| it.trim().parse().ok());
    }
    let depay = make(depay)?;
    damage::wait_for_first_keyframe(&depay);
    damage::watch_gaps(&depay, &tail.shared);
    add(&pipeline, &[&depay])?;
    let last = match parse {
        None => depay.clone(),
        Some(parse) => {
            let parse = make(parse)?;
            add(&pipeline, &[&parse])?;
            link(&depay, &parse)?;
            parse
        }
    };
    let output = |it: &gst::Element| it.static_pad("src").expect("a filter has a src pad");
    watch_arrival(&output(&depay), &tail.shared);
    watch_data(&output(&last), &tail.shared, tail.spec.limits);
    let caps = caps.parse::<gst::Caps>().expect("the table holds valid caps");
    tail.decode(&pipeline, &output(&last), &caps)?;
    if last != depay {
        sync(&last)?;
    }
    sync(&depay)?;
    let backlog = backlog()?;
    add(&pipeline, &[&backlog])?;
    link(&backlog, &depay)?;
    sync(&backlog)?;
    let input = backlog.static_pad("sink").expect("a queue has a sink pad");
    let shared = tail.shared.clone();
    // Before the depayloader, which lets nothing through while it waits for a keyframe.
    input.add_probe(gst::PadProbeType::BUFFER | gst::PadProbeType::BUFFER_LIST, move |_, _| {
        shared.data();
        gst::PadProbeReturn::Ok
    });
    pad.link(&input).map(drop).map_err(|it| broken(format!("linking {codec}: {it}")))
}

/// Holds packets while the decoder is behind: long enough for a burst, and not without end where
/// there is more than this machine can decode. Then the oldest go.
fn backlog() -> Result<gst::Element, SourceError> {
    let queue = make("queue")?;
    queue.set_property("max-size-time", BACKLOG_MAX.as_nanos() as u64);
    queue.set_property("max-size-bytes", BACKLOG_BYTES_MAX);
    queue.set_property("max-size-buffers", 0_u32);
    queue.set_property_from_str("leaky", "downstream");
    Ok(queue)
}

fn test(pipeline: &gst::Pipeline, pattern: &Pattern, tail: &Tail) -> Result<(), SourceError> {
    let (width, height) = (pattern.width, pattern.height);
    caps::check_size(width, height, tail.spec.limits)
        .map_err(|detail| SourceError { code: Code::Codec, detail })?;
    let source = make("videotestsrc")?;
    source.set_property("is-live", tail.spec.realtime);
    source.set_property("num-buffers", pattern.frames.map_or(-1, |it| it as i32));
    let class = source.property_type("pattern").and_then(gst::glib::EnumClass::with_type);
    let class = class.expect("videotestsrc has an enum of patterns");
    if class.value_by_nick(&pattern.pattern).is_none() {
        return Err(broken(format!("there is no test pattern `{}`", pattern.pattern)));
    }
    source.set_property_from_str("pattern", &pattern.pattern);
    let filter = make("capsfilter")?;
    let (n, d) = pattern.fps;
    let text = format!(
        "video/x-raw,format={},width={width},height={height},framerate={n}/{d}",
        pattern.format
    );
    let caps = text.parse::<gst::Caps>().map_err(|_| broken(format!("no such format: {text}")))?;
    filter.set_property("caps", caps);
    add(pipeline, &[&source, &filter])?;
    link(&source, &filter)?;
    link(&filter, &tail.convert)?;
    tail.shared.link();
    let output = filter.static_pad("src").expect("a filter has a src pad");
    watch_arrival(&output, &tail.shared);
    watch_data(&output, &tail.shared, tail.spec.limits);
    Ok(())
}

/// Remembers when each encoded picture passes `pad`, and when the camera says that it took it.
fn watch_arrival(pad: &gst::Pad, shared: &Arc<Shared>) {
    let shared = shared.clone();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        if let Some(buffer) = info.buffer() {
            shared.arrived(buffer.pts(), rtcp::captured(buffer));
        }
        gst::PadProbeReturn::Ok
    });
}

/// Counts what passes `pad`, and stops it where the pictures would be too large.
fn watch_data(pad: &gst::Pad, shared: &Arc<Shared>, limits: (u32, u32)) {
    let shared = shared.clone();
    let kinds = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
    if let Some(caps) = pad.current_caps() {
        see_caps(&caps, limits, &shared);
    }
    pad.add_probe(kinds, move |_, info| {
        if let Some(buffer) = info.buffer() {
            if shared.failed() {
                info.flow_res = Err(gst::FlowError::NotSupported);
                return gst::PadProbeReturn::Handled;
            }
            let keyframe = !buffer.flags().contains(gst::BufferFlags::DELTA_UNIT);
            shared.picture(buffer.size(), buffer.pts().map(Duration::from), keyframe);
        } else if let Some(gst::EventView::Caps(event)) = info.event().map(|it| it.view()) {
            see_caps(&event.caps_owned(), limits, &shared);
            // The decoder must not even see it. Not `Drop`: with GStreamer 1.22 the bindings then
            // free the event before the library does.
            if shared.failed() {
                return gst::PadProbeReturn::Handled;
            }
        }
        gst::PadProbeReturn::Ok
    });
}

/// Remembers the codec, and fails the connection if the pictures are too large.
fn see_caps(caps: &gst::Caps, limits: (u32, u32), shared: &Shared) {
    if let Some(codec) = caps::codec(caps) {
        shared.set_codec(codec);
    }
    caps::describe(caps, &mut shared.facts());
    let side = |name| caps.structure(0).and_then(|it| it.get::<i32>(name).ok()).unwrap_or(0);
    let (width, height) = (side("width").unsigned_abs(), side("height").unsigned_abs());
    if let Err(detail) = caps::check_size(width, height, limits) {
        shared.fail(Code::Codec, detail);
    }
}

fn credentials(source: &gst::Element, spec: &Spec) {
    source.set_property("user-id", spec.username.as_ref().map(Secret::expose));
    source.set_property("user-pw", spec.password.as_ref().map(Secret::expose));
}

/// Sets a property if the element has it.
fn set(element: &gst::Element, name: &str, value: &str) {
    if element.find_property(name).is_some() {
        element.set_property_from_str(name, value);
    }
}

fn make(factory: &str) -> Result<gst::Element, SourceError> {
    gst::ElementFactory::make(factory).build().map_err(|_| {
        broken(format!("GStreamer's element `{factory}` is missing; run scripts/setup"))
    })
}

fn add(pipeline: &gst::Pipeline, elements: &[&gst::Element]) -> Result<(), SourceError> {
    pipeline.add_many(elements).map_err(|it| broken(it.to_string()))
}

fn link(from: &gst::Element, to: &gst::Element) -> Result<(), SourceError> {
    from.link(to).map_err(|it| broken(it.to_string()))
}

fn sync(element: &gst::Element) -> Result<(), SourceError> {
    element.sync_state_with_parent().map_err(|it| broken(it.to_string()))
}

fn broken(detail: String) -> SourceError {
    SourceError { code: Code::Error, detail }
}
