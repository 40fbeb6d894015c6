//! Opens a stream once, by the same rules as the daemon, and says what comes of it.

use std::{
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{
    frame::Code,
    source::{
        Decoded, Next, Opener as _, SourceError, Spec,
        facts::Facts,
        gate::{Denied, Gate, Peer, Permit},
        gst::GstOpener,
        url::{Remote, SourceUrl},
    },
};

/// Cameras send their first report of time about 3 s after their first picture.
const REPORT_MAX: Duration = Duration::from_secs(6);

/// A rate is measured over at least this much of a live stream, and so many pictures of a file.
const RATE_MIN: Duration = Duration::from_secs(3);
const FILE_PICTURES: u64 = 250;

/// Longest wait for the first picture: some cameras send one keyframe in ten seconds or more.
const FIRST_MAX: Duration = Duration::from_secs(30);

/// Longest wait for a server to say its name, and the longest answer that is read.
const NAME_MAX: Duration = Duration::from_secs(2);
const NAME_BYTES_MAX: u64 = 4 << 10;

/// What came of one try.
#[derive(Debug)]
pub struct Probed {
    /// What the connection showed.
    pub facts: Facts,
    /// What the pictures showed; `None` iff there was none.
    pub measured: Option<Measured>,
    /// Why it failed, and the last lines that GStreamer said before. `None` iff it did not.
    pub failure: Option<(SourceError, Vec<String>)>,
}

/// What the pictures of a stream showed.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// From opening the stream to its first picture.
    pub first_picture: Duration,
    /// Decoded pictures.
    pub pictures: u64,
    /// Those that the decoder marked as broken.
    pub corrupt: u64,
    /// Width and height of the last one.
    pub size: (usize, usize),
    /// Time between the first and the last picture: in the stream's own time if it has one, as
    /// cameras begin with a burst.
    pub span: Duration,
    /// Whether the camera has said when it took a picture.
    pub sender_reports: bool,
    /// The camera's clock less this machine's in seconds, by the picture that was the fastest on its
    /// way: what it took for that is in it. `None` without sender reports.
    pub clock_offset: Option<f64>,
    first_pts: Option<Duration>,
    first_at: Instant,
}

impl Measured {
    fn new(opened: Instant, first: &Decoded) -> Measured {
        Measured {
            first_picture: first.decoded.saturating_duration_since(opened),
            pictures: 0,
            corrupt: 0,
            size: (0, 0),
            span: Duration::ZERO,
            sender_reports: false,
            clock_offset: None,
            first_pts: first.pts,
            first_at: first.arrived,
        }
    }

    fn add(&mut self, it: &Decoded) {
        self.pictures += 1;
        self.corrupt += u64::from(it.corrupt);
        self.size = (it.picture.width, it.picture.height);
        let by_pts = it.pts.zip(self.first_pts).and_then(|(now, first)| now.checked_sub(first));
        self.span = by_pts.unwrap_or_else(|| it.arrived.saturating_duration_since(self.first_at));
        if let Some(captured) = it.captured {
            self.sender_reports = true;
            let ahead = match captured.duration_since(it.arrived_wall) {
                Ok(ahead) => ahead.as_secs_f64(),
                Err(behind) => -behind.duration().as_secs_f64(),
            };
            self.clock_offset = Some(self.clock_offset.map_or(ahead, |it| it.max(ahead)));
        }
    }

    /// Pictures per second; `None` before the second picture.
    pub fn fps(&self) -> Option<f64> {
        let periods = self.pictures.checked_sub(1).filter(|it| 0 < *it)?;
        (!self.span.is_zero()).then(|| periods as f64 / self.span.as_secs_f64())
    }
}

/// Opens the stream and looks at its pictures for at most `most`, less when all is known.
pub fn probe(
    opener: &mut GstOpener,
    spec: &Spec,
    gate: &Arc<Gate>,
    most: Duration,
    stop: &CancellationToken,
) -> Probed {
    let mut measured = None;
    let failure = match admitted(opener, gate, stop) {
        Ok(permit) => watch(opener, spec, (permit, gate), (&mut measured, most), stop).err(),
        Err(error) => Some(error),
    };
    let failure = failure.map(|error| (error, opener.said()));
    let mut facts = opener.facts();
    if facts.server.is_none()
        && measured.is_some()
        && let SourceUrl::Rtsp(remote) = &spec.url
    {
        facts.server = name(remote);
    }
    Probed { facts, measured, failure }
}

type Admitted = Option<(Permit, Peer)>;

/// Waits until the stream may connect, as the daemon does.
fn admitted(
    opener: &mut GstOpener,
    gate: &Arc<Gate>,
    stop: &CancellationToken,
) -> Result<Admitted, SourceError> {
    let denied = |it: Denied| match it {
        Denied::Stopped => SourceError { code: Code::Error, detail: "stopped".to_owned() },
        Denied::Refused(_) => {
            let detail =
                "not tried: another stream of this host was refused with the same password";
            SourceError { code: Code::Auth, detail: detail.to_owned() }
        }
    };
    let Some(peer) = opener.peer(gate) else { return Ok(None) };
    gate.turn(&peer, stop).map_err(denied)?;
    opener.reach(stop)?;
    let permit = gate.permit(&peer, stop).map_err(denied)?;
    Ok(Some((permit, peer)))
}

fn watch(
    opener: &mut GstOpener,
    spec: &Spec,
    (admitted, gate): (Admitted, &Gate),
    (measured, most): (&mut Option<Measured>, Duration),
    stop: &CancellationToken,
) -> Result<(), SourceError> {
    let (mut permit, peer) = admitted.unzip();
    let opened = Instant::now();
    let refused = |error: SourceError| {
        if let (Code::Auth, Some(peer)) = (error.code, &peer) {
            // One try, whatever it was refused with.
            gate.refused(peer, None);
        }
        error
    };
    let mut source = opener.open().map_err(refused)?;
    while !stop.is_cancelled() {
        let next = source.next().map_err(refused)?;
        if let Some(it) = &mut permit {
            if source.is_signed_in() {
                it.signed_in();
            }
            if source.is_connected() || it.is_over() {
                permit = None;
            }
        }
        match next {
            Next::Picture(it) => {
                measured.get_or_insert_with(|| Measured::new(opened, &it)).add(&it)
            }
            Next::Idle => {}
            Next::Eos if opener.is_live() => {
                let detail = format!("{}: the stream ended", spec.url);
                return Err(SourceError { code: Code::Eos, detail });
            }
            Next::Eos => return Ok(()),
        }
        match measured {
            None if FIRST_MAX <= opened.elapsed() => {
                let detail = format!("{}: no picture in {} s", spec.url, FIRST_MAX.as_secs());
                return Err(SourceError { code: Code::Timeout, detail });
            }
            Some(it) if is_enough(it, &opener.facts(), spec, most) => return Ok(()),
            _ => {}
        }
    }
    Ok(())
}

/// Whether nothing more is to be learnt, or the time is over.
fn is_enough(it: &Measured, facts: &Facts, spec: &Spec, most: Duration) -> bool {
    let watched = it.first_at.elapsed();
    let rate = match spec.url.is_live() || spec.realtime {
        true => RATE_MIN <= it.span,
        false => FILE_PICTURES <= it.pictures,
    };
    let is_rtsp = matches!(spec.url, SourceUrl::Rtsp(_));
    let reports = !is_rtsp || it.sender_reports || REPORT_MAX <= watched;
    let keyframes = facts.keyframe_interval.is_some() || facts.codec.as_deref() == Some("raw");
    most <= watched || rate && reports && keyframes
}

/// What a server calls itself when it is asked what it can do, without a password.
fn name(remote: &Remote) -> Option<String> {
    if remote.tls {
        return None;
    }
    let port = remote.port_or_default("rtsp");
    let address = (&*remote.host, port).to_socket_addrs().ok()?.next()?;
    let mut stream = TcpStream::connect_timeout(&address, NAME_MAX).ok()?;
    stream.set_read_timeout(Some(NAME_MAX)).ok()?;
    let host =
        if remote.host.contains(':') { format!("[{}]", remote.host) } else { remote.host.clone() };
    let request = format!("OPTIONS rtsp://{host}:{port}/ RTSP/1.0\r\nCSeq: 1\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    let mut part = [0; 512];
    let deadline = Instant::now() + NAME_MAX;
    while !answer.ends_with(b"\r\n\r\n")
        && (answer.len() as u64) < NAME_BYTES_MAX
        && Instant::now() < deadline
    {
        let length = stream.read(&mut part).ok().filter(|it| 0 < *it)?;
        answer.extend_from_slice(&part[..length]);
    }
    let answer = String::from_utf8_lossy(&answer);
    let mut headers = answer.lines().filter_map(|it| it.split_once(':'));
    let server = headers.find(|it| it.0.eq_ignore_ascii_case("server"))?;
    Some(server.1.trim().to_owned()).filter(|it| !it.is_empty())
}
