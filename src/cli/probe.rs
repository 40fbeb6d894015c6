//! `check --probe`: opens every stream and says what comes of it.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{advice::advice, text::escape},
    config::plan::{LimitsPlan, Plan, StreamPlan},
    frame::Code,
    ledger::Stream,
    source::{
        SourceError,
        facts::{Carried, Facts},
        gate::{CONNECTING_MAX, Gate},
        gst::GstOpener,
        probe::{self, Measured, Probed},
        url::SourceUrl,
    },
};

/// A camera's clock that is further away than this is not used for the times of events.
const CLOCK_OFFSET_MAX: f64 = 2.0;

/// After a loss a stream shows nothing until the next keyframe.
const KEYFRAMES_MAX: Duration = Duration::from_secs(10);

/// What came of all streams.
#[derive(Debug)]
pub struct Probes(BTreeMap<String, Probe>);

#[derive(Debug)]
struct Probe {
    /// Its URL as it may be printed.
    url: String,
    tls: bool,
    is_rtsp: bool,
    probed: Probed,
}

impl Probes {
    /// Opens every stream, some at once, and looks at each for at most `most`.
    pub fn run(plan: &Plan, most: Duration) -> Probes {
        let streams: Vec<_> = plan.streams.iter().collect();
        let (next, gate) = (AtomicUsize::new(0), Arc::<Gate>::default());
        let done = Mutex::new(BTreeMap::new());
        thread::scope(|scope| {
            // More at once would be measured by how fast this machine decodes, not by what comes.
            for _ in 0..CONNECTING_MAX.min(streams.len()) {
                scope.spawn(|| {
                    while let Some((id, stream)) = streams.get(next.fetch_add(1, Relaxed)) {
                        let probe = Probe::run(id, stream, &plan.limits, &gate, most);
                        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                        done.insert((*id).clone(), probe);
                    }
                });
            }
        });
        Probes(done.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Streams that failed.
    pub fn failed(&self) -> usize {
        self.0.values().filter(|it| it.probed.failure.is_some()).count()
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut out: String = self.0.iter().map(|(id, it)| it.text(id)).collect();
        match self.failed() {
            0 => writeln!(out, "{} probed, all ok", self.0.len()),
            failed => writeln!(out, "{} probed, {failed} failed", self.0.len()),
        }
        .expect("a string takes all text");
        out
    }

    /// For programs: by stream.
    pub fn json(&self) -> Value {
        self.0
            .iter()
            .map(|(id, it)| (id.clone(), it.json()))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }
}

impl Probe {
    fn run(
        id: &str,
        plan: &StreamPlan,
        limits: &LimitsPlan,
        gate: &Arc<Gate>,
        most: Duration,
    ) -> Probe {
        let failed = |error| Probed {
            facts: Facts::default(),
            measured: None,
            failure: Some((error, Vec::new())),
        };
        // What is not needed for a limited rate would not be decoded, and so not be measured.
        let whole = plan.spec(limits).map(|mut it| {
            it.max_fps = None;
            it
        });
        let probed = match whole {
            Err(error) => failed(SourceError { code: Code::Error, detail: error.to_string() }),
            Ok(spec) => match GstOpener::new(spec.clone(), Arc::new(Stream::new(id))) {
                Err(error) => failed(error),
                Ok(mut opener) => {
                    let stop = CancellationToken::new();
                    probe::probe(&mut opener, &spec, gate, most, &stop)
                }
            },
        };
        let url = plan.parsed();
        let tls = url.as_ref().and_then(SourceUrl::remote).is_some_and(|it| it.0.tls);
        let is_rtsp = matches!(url, Some(SourceUrl::Rtsp(_)));
        Probe { url: plan.shown(), tls, is_rtsp, probed }
    }

    fn transport(&self) -> Option<&'static str> {
        match (self.probed.facts.carried, self.tls) {
            (Some(Carried::Tcp), false) => Some("tcp"),
            (Some(Carried::Tcp), true) => Some("tcp with TLS"),
            (Some(Carried::Udp), _) => Some("udp"),
            (None, true) => Some("https"),
            (None, false) => None,
        }
    }

    fn text(&self, id: &str) -> String {
        let Probed { facts, measured, failure } = &self.probed;
        let mut lines: Vec<(&str, String)> = vec![("url", self.url.clone())];
        let mut add = |name, value: Option<String>| lines.extend(value.map(|it| (name, it)));
        add("transport", self.transport().map(str::to_owned));
        add("server", facts.server.as_deref().map(escape));
        add("codec", codec(facts));
        if let Some(it) = measured {
            add("size", Some(format!("{}x{}", it.size.0, it.size.1)));
            add("rate", Some(rate(facts, it)));
            add("keyframes", keyframes(facts));
            add("B-frames", b_frames(facts).map(|it| if it { "yes" } else { "no" }.to_owned()));
            if self.is_rtsp {
                let reports = if it.sender_reports { "yes" } else { "none came" };
                add("sender reports", Some(reports.to_owned()));
            }
            add("clock", it.clock_offset.map(clock));
        }
        add("decoder", facts.decoder.as_ref().map(|it| format!("{}: {}", it.name, it.why)));
        add(
            "first picture",
            measured.as_ref().map(|it| format!("after {:.2} s", it.first_picture.as_secs_f64())),
        );
        for note in self.notes() {
            add("note", Some(note));
        }
        if let Some((error, log)) = failure {
            add("why", Some(escape(&error.detail)));
            for line in log {
                add("GStreamer said", Some(escape(line)));
            }
            add("what to do", Some(advice(error.code).to_owned()));
        }
        let state = failure.as_ref().map_or("ok", |it| it.0.code.name());
        let lines = lines.iter().map(|(name, value)| format!("  {name:<16}{value}\n"));
        format!("{id}: {state}\n{}", lines.collect::<String>())
    }

    fn json(&self) -> Value {
        let Probed { facts, measured, failure } = &self.probed;
        let it = measured.as_ref();
        let keyframes = facts.keyframe_interval;
        json!({
            "url": self.url,
            "ok": failure.is_none(),
            "transport": self.transport(),
            "server": facts.server,
            "codec": facts.codec,
            "profile": facts.profile,
            "level": facts.level,
            "width": it.map(|it| it.size.0),
            "height": it.map(|it| it.size.1),
            "announced_fps": facts.announced_fps,
            "measured_fps": it.and_then(Measured::fps),
            "measured_seconds": it.map(|it| it.span.as_secs_f64()),
            "pictures": it.map(|it| it.pictures),
            "corrupt_pictures": it.map(|it| it.corrupt),
            "keyframe_pictures": keyframes.map(|it| it.0),
            "keyframe_seconds": keyframes.and_then(|it| it.1).map(|it| it.as_secs_f64()),
            "b_frames": b_frames(facts),
            "sender_reports": it.filter(|_| self.is_rtsp).map(|it| it.sender_reports),
            "clock_offset_seconds": it.and_then(|it| it.clock_offset),
            "decoder": facts.decoder.as_ref().map(|it| &it.name),
            "decoder_reason": facts.decoder.as_ref().map(|it| &it.why),
            "first_picture_seconds": it.map(|it| it.first_picture.as_secs_f64()),
            "notes": self.notes(),
            "failure": failure.as_ref().map(|(error, log)| json!({
                "code": error.code.name(),
                "detail": error.detail,
                "log": log,
                "advice": advice(error.code),
            })),
        })
    }

    /// What works and should still be known.
    fn notes(&self) -> Vec<String> {
        let Probed { facts, measured, .. } = &self.probed;
        let mut notes = Vec::new();
        if let Some(year) = facts.server.as_deref().and_then(live555)
            && year < 2017
        {
            notes.push(format!(
                "LIVE555 of {year}: versions before 2017 end a connection that is opened again at once, and have known flaws; look for newer firmware"
            ));
        }
        let Some(it) = measured else { return notes };
        if let (Some(announced), Some(fps)) = (facts.announced_fps, it.fps())
            && fps < 0.8 * announced
        {
            notes.push(format!("{fps:.1} of {announced:.1} announced pictures a second came"));
        }
        if let Some((_, Some(time))) = facts.keyframe_interval
            && KEYFRAMES_MAX < time
        {
            notes.push(format!(
                "after a lost packet there is no picture until the next keyframe, up to {:.0} s; set a shorter interval in the camera",
                time.as_secs_f64()
            ));
        }
        if self.is_rtsp && !it.sender_reports {
            notes.push("without sender reports an event has the time of arrival".to_owned());
        }
        if it.clock_offset.is_some_and(|it| CLOCK_OFFSET_MAX < it.abs()) {
            notes.push(format!(
                "the clocks differ by more than {CLOCK_OFFSET_MAX} s, so events have the time of arrival; let the camera use NTP"
            ));
        }
        if 0 < it.corrupt {
            notes.push(format!("{} of {} pictures were broken", it.corrupt, it.pictures));
        }
        notes
    }
}

fn codec(facts: &Facts) -> Option<String> {
    let mut text = escape(facts.codec.as_deref()?);
    for (name, value) in [("profile", &facts.profile), ("level", &facts.level)] {
        if let Some(value) = value {
            write!(text, ", {name} {}", escape(value)).expect("a string takes all text");
        }
    }
    Some(text)
}

fn rate(facts: &Facts, it: &Measured) -> String {
    let announced = match facts.announced_fps {
        Some(fps) => format!("{fps:.2} announced"),
        None => "none announced".to_owned(),
    };
    match it.fps() {
        Some(fps) => {
            format!("{fps:.2} pictures/s measured over {:.1} s, {announced}", it.span.as_secs_f64())
        }
        None => format!("one picture, {announced}"),
    }
}

fn keyframes(facts: &Facts) -> Option<String> {
    if facts.codec.as_deref() == Some("raw") {
        return None;
    }
    Some(match facts.keyframe_interval {
        None => format!("{} in {} pictures", facts.keyframes, facts.pictures),
        Some((1, _)) => "every picture".to_owned(),
        Some((pictures, Some(time))) => {
            format!("every {pictures} pictures, {:.2} s", time.as_secs_f64())
        }
        Some((pictures, None)) => format!("every {pictures} pictures"),
    })
}

/// Whether pictures are sent in another order; `None` if too few have come to tell.
fn b_frames(facts: &Facts) -> Option<bool> {
    (facts.reordered || facts.keyframe_interval.is_some() && facts.decoder.is_some())
        .then_some(facts.reordered)
}

fn clock(offset: f64) -> String {
    let ms = (offset.abs() * 1000.0).round();
    let way = if offset < 0.0 { "behind" } else { "ahead of" };
    format!("{ms} ms {way} this machine's, the way of the picture included")
}

/// The year in a server's name such as `LIVE555 Streaming Media v2014.05.27`.
fn live555(server: &str) -> Option<u32> {
    let lower = server.to_ascii_lowercase();
    let (_, version) = lower.split_once("live555")?;
    let digits = version.find(|it: char| it.is_ascii_digit())?;
    // Older ones write `0.92`.
    let (year, _) = version[digits..].split_once('.')?;
    year.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_year_of_a_live555_is_read_and_other_servers_have_none() {
        assert_eq!(live555("LIVE555 Streaming Media v2014.05.27"), Some(2014));
        assert_eq!(live555("Live555 Streaming Media v2021.08.24 and more"), Some(2021));
        assert_eq!(live555("GStreamer RTSP server"), None);
        assert_eq!(live555("live555"), None);
    }

    #[test]
    fn clocks_are_told_in_words() {
        assert_eq!(clock(-0.0124), "12 ms behind this machine's, the way of the picture included");
        assert_eq!(clock(3.5), "3500 ms ahead of this machine's, the way of the picture included");
    }
}
