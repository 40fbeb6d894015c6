//! A camera whose clock, RTP and RTCP are in the hands of a test: real H.264 by a server of our own.

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{Builder, sleep},
    time::{Duration, Instant, SystemTime},
};

use gstreamer::{self as gst, prelude::*};
use gstreamer_app as gst_app;

use crate::{
    support_camera::{SDP, described},
    support_proxy::{Damage, Done, Random},
};

/// Pictures per second.
pub(crate) const FPS: u32 = 25;

/// Ticks of RTP timestamps per second.
pub(crate) const RATE: i64 = 90_000;

/// A keyframe comes every so many pictures.
pub(crate) const GOP: usize = 25;

const NTP_TO_UNIX: Duration = Duration::from_secs(2_208_988_800);

/// No packet has more bytes of a picture.
const PACKET_BYTES: usize = 1_200;

/// What the camera does. It can be changed as it sends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Knobs {
    /// Its clock less the host's, in milliseconds.
    pub(crate) ahead_ms: i64,
    /// From the moment that a picture is taken to its sending.
    pub(crate) way: Duration,
    /// From the start to the first report. `None`: it sends none.
    pub(crate) first_report: Option<Duration>,
    /// From each report to the next.
    pub(crate) report_every: Duration,
    /// Its SSRC.
    pub(crate) source: u32,
    /// Whether the last packet of a picture is marked.
    pub(crate) marks: bool,
    /// So many pictures have the timestamp of the one before.
    pub(crate) equal: u32,
    /// Added to the RTP timestamps from now on, once.
    pub(crate) shift: i64,
    /// The next packet's number, once.
    pub(crate) sequence: Option<u16>,
    /// What the packets suffer.
    pub(crate) damage: Damage,
}

/// A camera with a right clock, which tells it at once.
pub(crate) const GOOD: Knobs = Knobs {
    ahead_ms: 0,
    way: Duration::from_millis(30),
    first_report: Some(Duration::ZERO),
    report_every: Duration::from_millis(500),
    source: 0x6768_6f73,
    marks: true,
    equal: 0,
    shift: 0,
    sequence: None,
    damage: Damage {
        seed: 0,
        loss: 0.0,
        duplicate: 0.0,
        reorder: 0.0,
        delay: Duration::ZERO,
        flip: 0.0,
    },
};

/// Packets, each with the moment that it is due.
type Queue = VecDeque<(Instant, Vec<u8>)>;

/// The first line of a request, and its headers.
type Request = (String, Vec<(String, String)>);

/// Runs until it is dropped.
pub(crate) struct Camera {
    url: String,
    shared: Arc<Shared>,
}

struct Shared {
    knobs: Mutex<Knobs>,
    first_timestamp: u32,
    /// When each picture was taken, by the host's clock.
    taken: Mutex<Vec<SystemTime>>,
    done: Done,
    stop: AtomicBool,
}

impl Camera {
    pub(crate) fn start(knobs: Knobs) -> Camera {
        Camera::start_at(knobs, 0x1000_0000)
    }

    /// One whose first picture has this RTP timestamp.
    pub(crate) fn start_at(knobs: Knobs, first_timestamp: u32) -> Camera {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("rtsp://{}/stream", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            knobs: Mutex::new(knobs),
            first_timestamp,
            taken: Mutex::default(),
            done: Done::default(),
            stop: AtomicBool::new(false),
        });
        pictures();
        let all = shared.clone();
        apart(move || {
            for client in listener.incoming() {
                let (client, shared) = (client.unwrap(), all.clone());
                // A client may leave at any time.
                apart(move || drop(shared.serve(&client)));
            }
        });
        Camera { url, shared }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Changes what it does, from the next picture on.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Knobs)) {
        change(&mut self.shared.knobs());
    }

    /// When each picture was taken so far, by the host's clock.
    pub(crate) fn taken(&self) -> Vec<SystemTime> {
        self.shared.taken.lock().unwrap().clone()
    }

    /// What was done to packets so far.
    pub(crate) fn done(&self) -> &Done {
        &self.shared.done
    }
}

impl Drop for Camera {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
    }
}

/// Where packets go: a channel of the connection, or a pair of sockets.
enum Line {
    Tcp(Arc<Mutex<TcpStream>>),
    Udp([UdpSocket; 2]),
}

impl Line {
    fn send(&self, channel: u8, packet: &[u8]) -> io::Result<()> {
        match self {
            Line::Tcp(client) => {
                let [high, low] = u16::try_from(packet.len()).unwrap().to_be_bytes();
                let mut unit = vec![b'$', channel, high, low];
                unit.extend(packet);
                client.lock().unwrap().write_all(&unit)
            }
            // Nobody may listen there yet, or any more.
            Line::Udp(sockets) => sockets[usize::from(channel)].send(packet).map(drop).or(Ok(())),
        }
    }
}

impl Shared {
    fn knobs(&self) -> MutexGuard<'_, Knobs> {
        self.knobs.lock().unwrap()
    }

    /// Answers the requests of one client, and sends from PLAY on.
    fn serve(self: Arc<Shared>, client: &TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let writer = Arc::new(Mutex::new(client.try_clone()?));
        let mut reader = BufReader::new(client);
        let mut line = None;
        while let Some((first, headers)) = request(&mut reader)? {
            let header = |name: &str| {
                let found = headers.iter().find(|it| it.0 == name);
                found.map_or("", |it| it.1.as_str())
            };
            let method = first.split(' ').next().unwrap_or_default();
            let answer = match method {
                "OPTIONS" => "200 OK\r\nPublic: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n".to_owned(),
                "DESCRIBE" => described(&format!(
                    "{SDP}m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n\
                     a=fmtp:96 packetization-mode=1\r\na=control:track1\r\n"
                )),
                "SETUP" => {
                    let (way, transport) = set_up(header("transport"), &writer)?;
                    line = Some(way);
                    format!("200 OK\r\nSession: 1\r\nTransport: {transport}\r\n\r\n")
                }
                _ => "200 OK\r\nSession: 1\r\n\r\n".to_owned(),
            };
            let (status, rest) = answer.split_once("\r\n").unwrap();
            let sequence = header("cseq");
            let text = format!("RTSP/1.0 {status}\r\nCSeq: {sequence}\r\n{rest}");
            writer.lock().unwrap().write_all(text.as_bytes())?;
            if method == "PLAY"
                && let Some(line) = line.take()
            {
                let shared = self.clone();
                apart(move || drop(shared.send(&line)));
            }
        }
        Ok(())
    }

    /// Sends pictures in their own time, without end.
    fn send(&self, line: &Line) -> io::Result<()> {
        let start = Instant::now();
        let mut random = Random(self.knobs().damage.seed);
        let mut queue = VecDeque::new();
        let mut stream = Stream { base: self.first_timestamp, sequence: 65_000, timestamp: 0 };
        let mut report_at = self.knobs().first_report.map(|it| start + it);
        let mut held: Option<Vec<u8>> = None;
        for (number, picture) in (0_u32..).zip(pictures().iter().cycle()) {
            let due = start + number * Duration::from_secs(1) / FPS;
            flush(line, &mut queue, due)?;
            if self.stop.load(SeqCst) {
                return Ok(());
            }
            let mut knobs = self.knobs();
            let now = *knobs;
            (knobs.shift, knobs.sequence) = (0, None);
            knobs.equal = knobs.equal.saturating_sub(1);
            drop(knobs);
            stream.base = stream.base.wrapping_add(now.shift as u32);
            stream.sequence = now.sequence.unwrap_or(stream.sequence);
            if report_at.is_some_and(|it| it <= Instant::now()) {
                line.send(1, &stream.report(&now, start))?;
                report_at = Some(Instant::now() + now.report_every);
            }
            self.taken.lock().unwrap().push(SystemTime::now() - now.way);
            if now.equal == 0 {
                // A picture from before the start has one, too.
                let before = stream.at(start, Instant::now());
                stream.timestamp = before.wrapping_sub(ticks(now.way));
            }
            for packet in stream.packets(picture, &now) {
                self.damage(packet, now.damage, &mut random, (&mut queue, &mut held));
            }
        }
        Ok(())
    }

    /// Queues a packet, or what becomes of it.
    fn damage(
        &self,
        packet: Vec<u8>,
        damage: Damage,
        random: &mut Random,
        (queue, held): (&mut Queue, &mut Option<Vec<u8>>),
    ) {
        let done = &self.done;
        done.packets.fetch_add(1, SeqCst);
        if random.next() < damage.loss {
            done.lost.fetch_add(1, SeqCst);
            return;
        }
        if held.is_none() && random.next() < damage.reorder {
            done.reordered.fetch_add(1, SeqCst);
            *held = Some(packet);
            return;
        }
        let due = Instant::now() + damage.delay.mul_f64(random.next());
        // Those behind wait, too.
        let due = queue.back().map_or(due, |it| due.max(it.0));
        if random.next() < damage.duplicate {
            done.duplicated.fetch_add(1, SeqCst);
            queue.push_back((due, packet.clone()));
        }
        queue.push_back((due, packet));
        queue.extend(held.take().map(|it| (due, it)));
    }
}

/// Sends what is due until `end`, and waits for that.
fn flush(line: &Line, queue: &mut Queue, end: Instant) -> io::Result<()> {
    loop {
        let next = queue.front().map_or(end, |it| it.0.min(end));
        // This is the pace of the line, not waiting for something to happen.
        sleep(next.saturating_duration_since(Instant::now()));
        match queue.pop_front_if(|it| it.0 <= Instant::now()) {
            Some((_, packet)) => line.send(0, &packet)?,
            None if end <= Instant::now() => return Ok(()),
            None => {}
        }
    }
}

/// The state of one RTP stream.
struct Stream {
    base: u32,
    sequence: u16,
    timestamp: u32,
}

impl Stream {
    /// The timestamp of a moment.
    fn at(&self, start: Instant, now: Instant) -> u32 {
        self.base.wrapping_add(ticks(now - start))
    }

    /// A sender report of this moment.
    fn report(&self, knobs: &Knobs, start: Instant) -> Vec<u8> {
        let (mono, wall) = (Instant::now(), SystemTime::now());
        let wall = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap() + NTP_TO_UNIX;
        let ahead = Duration::from_millis(knobs.ahead_ms.unsigned_abs());
        let clock = if knobs.ahead_ms < 0 { wall - ahead } else { wall + ahead };
        let parts = ((u64::from(clock.subsec_nanos()) << 32) / 1_000_000_000) as u32;
        let mut packet = vec![0x80, 200, 0, 6];
        for word in
            [knobs.source, clock.as_secs() as u32, parts, self.at(start, mono), 1_000, 1_000_000]
        {
            packet.extend(word.to_be_bytes());
        }
        packet
    }

    /// The packets of one picture.
    fn packets(&mut self, picture: &[Vec<u8>], knobs: &Knobs) -> Vec<Vec<u8>> {
        let mut payloads = Vec::new();
        for unit in picture {
            if unit.len() <= PACKET_BYTES {
                payloads.push(unit.clone());
                continue;
            }
            let (indicator, kind) = (unit[0] & 0xe0 | 28, unit[0] & 0x1f);
            let parts: Vec<_> = unit[1..].chunks(PACKET_BYTES).collect();
            for (i, part) in parts.iter().enumerate() {
                let ends = u8::from(i == 0) << 7 | u8::from(i + 1 == parts.len()) << 6;
                payloads.push([&[indicator, ends | kind][..], part].concat());
            }
        }
        let last = payloads.len() - 1;
        let packet = |(i, payload): (usize, &Vec<u8>)| {
            let mark = u8::from(knobs.marks && i == last) << 7;
            let mut packet = vec![0x80, mark | 96];
            packet.extend(self.sequence.to_be_bytes());
            packet.extend(self.timestamp.to_be_bytes());
            packet.extend(knobs.source.to_be_bytes());
            packet.extend(payload);
            self.sequence = self.sequence.wrapping_add(1);
            packet
        };
        payloads.iter().enumerate().map(packet).collect()
    }
}

/// A duration in ticks, as far as 32 bits tell.
fn ticks(duration: Duration) -> u32 {
    (duration.as_nanos() * 90_000 / 1_000_000_000) as u32
}

/// A request's first line and headers. Packets in between are left out. `None` at the end.
fn request(reader: &mut BufReader<&TcpStream>) -> io::Result<Option<Request>> {
    while reader.fill_buf()?.first() == Some(&b'$') {
        let mut head = [0; 4];
        reader.read_exact(&mut head)?;
        let mut packet = vec![0; usize::from(u16::from_be_bytes([head[2], head[3]]))];
        reader.read_exact(&mut packet)?;
    }
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end() {
            "" if lines.is_empty() => {}
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let first = lines.remove(0);
    let header = |it: &String| {
        let (name, value) = it.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    Ok(Some((first, lines.iter().filter_map(header).collect())))
}

/// The line that a client asks for, and how it is told so.
fn set_up(transport: &str, client: &Arc<Mutex<TcpStream>>) -> io::Result<(Line, String)> {
    if transport.contains("TCP") {
        let answer = "RTP/AVP/TCP;unicast;interleaved=0-1".to_owned();
        return Ok((Line::Tcp(client.clone()), answer));
    }
    let ports = transport.split("client_port=").nth(1).unwrap();
    let ports = ports.split(';').next().unwrap().to_owned();
    let (first, second) = ports.split_once('-').unwrap();
    let socket = |port: &str| {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(("127.0.0.1", port.parse().unwrap()))?;
        io::Result::Ok(socket)
    };
    let sockets = [socket(first)?, socket(second)?];
    let [rtp, rtcp] = [0, 1].map(|it| sockets[it].local_addr().unwrap().port());
    let answer = format!("RTP/AVP;unicast;client_port={ports};server_port={rtp}-{rtcp}");
    Ok((Line::Udp(sockets), answer))
}

/// Two groups of pictures as their NAL units, each group with its parameter sets.
fn pictures() -> &'static [Vec<Vec<u8>>] {
    static PICTURES: OnceLock<Vec<Vec<Vec<u8>>>> = OnceLock::new();
    PICTURES.get_or_init(|| {
        gst::init().unwrap();
        let count = 2 * GOP;
        let text = format!(
            "videotestsrc num-buffers={count} pattern=ball \
             ! video/x-raw,format=I420,width=320,height=240,framerate={FPS}/1 \
             ! openh264enc gop-size={GOP} complexity=low bitrate=400000 \
             ! h264parse config-interval=-1 \
             ! video/x-h264,stream-format=avc,alignment=au ! appsink name=out sync=false"
        );
        let pipeline = gst::parse::launch(&text).unwrap().downcast::<gst::Pipeline>().unwrap();
        let sink = pipeline.by_name("out").unwrap().downcast::<gst_app::AppSink>().unwrap();
        pipeline.set_state(gst::State::Playing).unwrap();
        let mut pictures = Vec::new();
        while let Ok(sample) = sink.pull_sample() {
            let data = sample.buffer().unwrap().map_readable().unwrap();
            pictures.push(units(&data));
        }
        pipeline.set_state(gst::State::Null).unwrap();
        assert_eq!(pictures.len(), count);
        let parameters = |it: &Vec<Vec<u8>>| it.iter().any(|it| it[0] & 0x1f == 7);
        assert!(pictures.iter().step_by(GOP).all(parameters), "each group can be decoded alone");
        pictures
    })
}

/// The NAL units of a picture, each after its length in four bytes.
fn units(mut data: &[u8]) -> Vec<Vec<u8>> {
    let mut units = Vec::new();
    while let Some(head) = data.first_chunk() {
        let (unit, rest) = data[4..].split_at(u32::from_be_bytes(*head) as usize);
        units.push(unit.to_vec());
        data = rest;
    }
    units
}

fn apart(body: impl FnOnce() + Send + 'static) {
    drop(Builder::new().name("camera".into()).spawn(body).unwrap());
}
