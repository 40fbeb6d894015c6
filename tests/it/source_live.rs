//! Sources that fail and come back: a real RTSP server, and a source played from a script.

use std::{
    env, fs,
    net::TcpListener,
    process::Command,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    frame::{Code, Colour, Layout, Matrix, Picture, Planes, Siting, State, TimeSource},
    ledger::Stream,
    secret::Secret,
    source::{
        Closed, Decoded, End, Next, Opener, Output, Settings, Source, SourceError, Spec,
        gst::{GstOpener, closing},
    },
    stage::{Reason, StageName},
};
use tokio_util::sync::CancellationToken;

use crate::{
    source::{Out, Ran, clip, first_failure, frames_of, run_opener, run_until, spec},
    support_rtsp::{Media, Server},
};

const CANARY: &str = "c@n:/?#r%y";

fn pattern() -> Media {
    Media::Pattern { size: (320, 240), fps: 25 }
}

#[test]
fn rtsp_gives_pictures_with_their_arrival_and_the_servers_clock() {
    let server = Server::start(&pattern(), 0, None);
    let spec = spec(server.url());
    let rtcp = |it: &Out| matches!(it, Out::Frame(it) if it.meta.dated.source == TimeSource::Rtcp);
    let ran = run_until(&spec, |out| 30 <= frames_of(out) && out.last().is_some_and(rtcp));
    assert_eq!((ran.end, ran.states()[1]), (End::Stopped, (State::Up, None)));
    for meta in ran.metas() {
        assert_eq!((meta.size, meta.epoch), ((320, 240), 0));
        let decode = meta.timing.decoded - meta.timing.arrived;
        assert!(decode < Duration::from_secs(1), "{decode:?}");
    }
    let last = ran.metas().last().unwrap();
    let off = last.ingest_time.duration_since(last.time).unwrap_or_else(|it| it.duration());
    assert!(off < Duration::from_secs(1), "server and client share a clock: {off:?}");
    assert!(ran.frames().count() as u64 <= ran.stream.received.load(Relaxed));
    assert_eq!(ran.stream.connects.load(Relaxed), 1);
}

#[test]
fn a_camera_may_change_the_size_and_rate_of_its_pictures_within_a_connection() {
    let server = Server::start(&Media::Changing { size: (320, 240), fps: 25 }, 0, None);
    let shapes = [((320, 240), 25), ((640, 480), 25), ((640, 480), 5), ((176, 144), 10)];
    let mut at = 0;
    // The encoder may have pictures of the old shape in hand, so the shape is told by size and pace.
    let pace = |it: &[Out]| {
        let metas = it.iter().rev().filter_map(|it| match it {
            Out::Frame(it) => Some((it.meta.size, it.meta.pts)),
            Out::State(_) => None,
        });
        let last: Vec<_> = metas.take(6).collect();
        let (size, end) = *last.first()?;
        let (_, begin) = *last.get(5)?;
        let fps = 5.0 / (end - begin).as_secs_f64();
        let same = last.iter().all(|it| it.0 == size);
        same.then_some((size, fps.round() as u32))
    };
    let ran = run_until(&spec(server.url()), |out| {
        if shapes.get(at).is_some_and(|it| pace(out) == Some(*it)) {
            at += 1;
            match shapes.get(at) {
                Some((size, fps)) => server.reshape(*size, *fps),
                None => return true,
            }
        }
        at == shapes.len()
    });
    let changes: Vec<_> = ran.changes().collect();
    assert_eq!((ran.end, at), (End::Stopped, shapes.len()), "{changes:?}");
    let quiet = [State::Connecting, State::Up, State::Removed].map(|it| (it, None));
    assert_eq!(ran.states(), quiet, "{changes:?}");
    assert_eq!(ran.stream.connects.load(Relaxed), 1);
    let numbers: Vec<_> = ran.metas().map(|it| (it.epoch, it.frame)).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).map(|it| (0, it)).collect::<Vec<_>>());
}

#[test]
fn a_camera_file_over_rtsp_gives_every_picture() {
    let media = Media::File { path: clip("carphone_pristine.mp4"), times: 1 };
    let server = Server::start(&media, 0, None);
    let failed = |out: &[Out]| matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
    let ran = run_until(&spec(server.url()), failed);
    let states: Vec<_> = ran.changes().collect();
    assert_eq!(ran.frames().count(), 120, "{states:?}");
    assert_eq!(ran.states()[2], (State::Down, Some(Code::Eos)), "{states:?}");
}

#[test]
fn a_wrong_password_is_auth_and_a_right_one_opens() {
    let server = Server::start(&pattern(), 0, Some(("viewer", CANARY)));
    let right = Spec {
        username: Some(Secret::new("viewer")),
        password: Some(Secret::new(CANARY)),
        ..spec(server.url())
    };
    let ran = run_until(&right, |out| frames_of(out) == 3);
    assert_eq!(ran.frames().count(), 3);
    assert!(!format!("{right:?} {:?}", ran.states()).contains(CANARY));
    for password in [None, Some(Secret::new("other"))] {
        let (state, code, detail) = first_failure(&Spec { password, ..right.clone() });
        assert_eq!((state, code), (State::Down, Code::Auth), "{detail}");
    }
}

#[test]
fn a_password_never_comes_back_in_a_failure() {
    let dead = free_port();
    let encoded = "c%40n%3A%2F%3F%23r%25y";
    for url in [
        format!("rtsp://viewer:{encoded}@127.0.0.1:{dead}/a?password={encoded}"),
        format!("http://viewer:{encoded}@127.0.0.1:{dead}/a?password={encoded}"),
        format!("rtsp://viewer:{encoded}@nowhere.invalid/user=a_password={encoded}"),
    ] {
        let spec = spec(url);
        assert_eq!(spec.password.as_ref().map(Secret::expose), Some(CANARY));
        let (_, _, detail) = first_failure(&spec);
        for text in [detail, format!("{spec:?}")] {
            assert!(!text.contains(CANARY) && !text.contains(encoded), "{text}");
        }
    }
}

#[test]
fn failures_to_connect_have_their_names() {
    let server = Server::start(&pattern(), 0, None);
    let dead = free_port();
    for (url, expected) in [
        (format!("rtsp://127.0.0.1:{}/other", server.port()), Code::NotFound),
        (format!("rtsp://127.0.0.1:{dead}/a"), Code::Refused),
        (format!("http://127.0.0.1:{dead}/a"), Code::Refused),
        ("rtsp://nowhere.invalid/a".to_owned(), Code::Dns),
        ("http://nowhere.invalid/a".to_owned(), Code::Dns),
        (format!("rtsps://127.0.0.1:{}/stream", server.port()), Code::Tls),
    ] {
        let (state, code, detail) = first_failure(&spec(&url));
        assert_eq!((state, code), (State::Down, expected), "{url}: {detail}");
        assert!(detail.contains(&url), "{detail}");
    }
}

/// A port on which nobody listens.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_camera_that_goes_and_comes_back_is_read_again_in_a_new_epoch() {
    let mut server = Some(Server::start(&pattern(), 0, None));
    let port = server.as_ref().unwrap().port();
    let mut gone = None;
    let ran = run_until(&spec(server.as_ref().unwrap().url()), |out| {
        let failures = out.iter().filter(|it| matches!(it, Out::State(it) if it.code.is_some()));
        if server.is_some() && gone.is_none() && frames_of(out) == 10 {
            server = None;
            gone = Some(Instant::now());
        } else if server.is_none() && 0 < failures.count() {
            server = Some(Server::start(&pattern(), port, None));
        }
        20 <= frames_of(out) && matches!(out.last(), Some(Out::Frame(it)) if it.meta.epoch == 1)
    });
    assert!(ran.metas().any(|it| it.epoch == 1));
    assert!(gone.unwrap().elapsed() < Duration::from_secs(15), "{:?}", gone.unwrap().elapsed());
    let states: Vec<_> = ran.states().iter().map(|it| it.0).collect();
    assert_eq!(states.first(), Some(&State::Connecting));
    assert_eq!(states.iter().filter(|it| **it == State::Up).count(), 2, "{states:?}");
    assert_eq!(ran.stream.connects.load(Relaxed), 2);
}

#[test]
fn a_server_that_says_nothing_does_not_hold_up_the_stop() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let spec = spec(format!("rtsp://{}/a", silent.local_addr().unwrap()));
    let stream = Arc::new(Stream::new("test"));
    let mut opener = GstOpener::new(spec, stream).unwrap();
    let started = Instant::now();
    let mut source = opener.open().unwrap();
    assert!(matches!(source.next(), Ok(Next::Idle)));
    drop(source);
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

#[test]
fn pipelines_are_gone_after_many_connections() {
    // In a process of its own: what the other tests of this one are closing is counted too.
    let output = Command::new(env::current_exe().unwrap())
        .args(["source_live::many_connections", "--exact", "--ignored"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "the test above runs it"]
fn many_connections() {
    for _ in 0..20 {
        run_until(&spec("test:?size=64x48&frames=3"), |_| false);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while 0 < closing() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(closing(), 0);
}

/// One step of a played source.
#[derive(Clone, Copy)]
enum Step {
    /// A picture with this PTS in milliseconds.
    At(u64),
    Corrupt(u64),
    Idle,
    Fail(Code),
}

/// Plays one list of steps per connection; a list that is at its end is an end of the stream.
struct Played {
    connections: std::vec::IntoIter<Vec<Step>>,
    live: bool,
}

struct Playing(std::vec::IntoIter<Step>);

struct Grey;

impl Planes for Grey {
    fn plane(&self, _index: usize) -> &[u8] {
        &[128]
    }
}

fn picture(pts: u64, corrupt: bool) -> Next {
    let colour = Colour {
        matrix: Matrix::Bt601,
        full_range: true,
        siting_x: Siting::Centre,
        siting_y: Siting::Centre,
    };
    let now = Instant::now();
    Next::Picture(Decoded {
        picture: Picture {
            layout: Layout::Gray8,
            colour,
            width: 1,
            height: 1,
            strides: [1, 0, 0],
            planes: Box::new(Grey),
        },
        pts: Some(Duration::from_millis(pts)),
        arrived: now,
        arrived_wall: SystemTime::now(),
        decoded: now,
        captured: None,
        reports: None,
        corrupt,
        label: None,
    })
}

impl Source for Playing {
    fn next(&mut self) -> Result<Next, SourceError> {
        Ok(match self.0.next() {
            Some(Step::At(pts)) => picture(pts, false),
            Some(Step::Corrupt(pts)) => picture(pts, true),
            Some(Step::Idle) => Next::Idle,
            Some(Step::Fail(code)) => {
                return Err(SourceError { code, detail: "as played".to_owned() });
            }
            None => Next::Eos,
        })
    }
}

impl Opener for Played {
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError> {
        let steps = self.connections.next().expect("a connection to play");
        Ok(Box::new(Playing(steps.into_iter())))
    }

    fn is_live(&self) -> bool {
        self.live
    }
}

fn plain() -> Settings {
    Settings {
        max_fps: None,
        looped: false,
        start_time: None,
        max_clock_offset: Duration::from_secs(2),
        first_epoch: 3,
        gate: Arc::default(),
        leave: Arc::default(),
    }
}

fn play(live: bool, settings: Settings, steps: &[&[Step]], frames: usize) -> Ran {
    let connections = steps.iter().map(|it| it.to_vec()).collect::<Vec<_>>().into_iter();
    let mut opener = Played { connections, live };
    let stream = Arc::new(Stream::new("played"));
    let ran = run_opener(&mut opener, settings, stream, |out| frames_of(out) == frames);
    ran.check_account();
    ran
}

use Step::{At, Corrupt, Fail, Idle};

#[test]
fn corrupt_pictures_are_counted_in_their_place() {
    let steps = [Corrupt(0), At(40), Corrupt(80), Corrupt(120), Idle, At(160), Corrupt(200)];
    let ran = play(false, plain(), &[&steps], 99);
    let got: Vec<_> = ran.metas().map(|it| (it.epoch, it.frame, it.skipped.total())).collect();
    assert_eq!(got, [(3, 1, 1), (3, 4, 2)]);
    let ended = ran.changes().last().unwrap().ended.unwrap();
    assert_eq!((ended.epoch, ended.frames, ended.skipped.total()), (3, 6, 1));
    assert_eq!(ran.stream.dropped(StageName::Source, Reason::Corrupt), 4);
}

#[test]
fn a_pts_that_jumps_starts_an_epoch_without_a_new_connection() {
    let steps = [At(0), At(40), At(40), At(20_000), At(20_040), At(0), At(40)];
    let ran = play(false, plain(), &[&steps], 99);
    let got: Vec<_> = ran.metas().map(|it| (it.epoch, it.frame)).collect();
    assert_eq!(got, [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (5, 0), (5, 1)]);
    assert_eq!(ran.states().iter().filter(|it| it.0 == State::Up).count(), 3);
    assert_eq!(ran.stream.connects.load(Relaxed), 1);
}

#[test]
fn max_fps_starts_its_grid_again_in_each_epoch_and_closes_its_account() {
    let settings = Settings { max_fps: Some(10.0), looped: true, ..plain() };
    let steps: Vec<_> = (0..8).map(|i| At(i * 40)).collect();
    let ran = play(false, settings, &[&steps, &steps, &steps], 7);
    let got: Vec<_> = ran.metas().map(|it| (it.epoch, it.frame)).collect();
    assert_eq!(got, [(3, 0), (3, 2), (3, 5), (3, 7), (4, 0), (4, 2), (4, 5)]);
}

#[test]
fn a_live_stream_names_what_it_does_once_per_outage() {
    let fail = [Fail(Code::Refused)];
    let steps: &[&[Step]] =
        &[&fail, &fail, &[At(0), At(40), Fail(Code::Stall)], &[At(0)], &[At(0)]];
    let ran = play(true, plain(), steps, 4);
    assert_eq!(
        ran.states(),
        [
            (State::Connecting, None),
            (State::Down, Some(Code::Refused)),
            (State::Up, None),
            (State::Stalled, Some(Code::Stall)),
            (State::Connecting, None),
            (State::Up, None),
            (State::Down, Some(Code::Eos)),
            (State::Connecting, None),
            (State::Up, None),
            (State::Removed, None),
        ]
    );
    assert_eq!(ran.changes().map(|it| it.attempt).collect::<Vec<_>>()[..3], [1, 1, 3]);
    assert!(ran.changes().all(|it| it.code.is_some() == it.retry_in.is_some()));
}

#[test]
fn a_looped_file_without_a_picture_ends_instead_of_spinning() {
    let ran = play(false, Settings { looped: true, ..plain() }, &[&[]], 99);
    assert_eq!(ran.end, End::Ended);
}

/// Refuses everything after the first frame.
struct Broken(usize);

impl Output for Broken {
    fn frame(&mut self, _: ghostwatch::frame::Frame, _: &CancellationToken) -> Result<(), Closed> {
        self.0 += 1;
        if self.0 == 2 { Err(Closed) } else { Ok(()) }
    }

    fn state(
        &mut self,
        _: ghostwatch::frame::StateChange,
        _: &CancellationToken,
    ) -> Result<(), Closed> {
        Ok(())
    }
}

#[test]
fn a_source_ends_when_nobody_takes_its_frames() {
    let steps = vec![At(0), At(40), At(80)];
    let mut opener = Played { connections: vec![steps].into_iter(), live: true };
    let (stream, stop) = (Arc::new(Stream::new("played")), CancellationToken::new());
    let mut output = Broken(0);
    let end = ghostwatch::source::run(&mut opener, stream, plain(), &mut output, &stop);
    assert_eq!((end, output.0), (End::Closed, 2));
}

#[test]
fn a_stop_ends_a_wait_at_once() {
    let stop = CancellationToken::new();
    let other = stop.clone();
    let started = Instant::now();
    let thread = std::thread::Builder::new().spawn(move || other.cancel()).unwrap();
    ghostwatch::source::pause::wait(&stop, Duration::from_secs(300));
    thread.join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    let started = Instant::now();
    ghostwatch::source::pause::wait(&CancellationToken::new(), Duration::from_millis(20));
    assert!(Duration::from_millis(20) <= started.elapsed());
}

#[test]
fn a_truncated_file_gives_what_it_has() {
    // Written by a recorder whose index comes first, and cut: half of the pictures are there.
    let whole = fs::read(clip("bigbuckbunny.mp4")).unwrap();
    let path = env::temp_dir().join(format!("ghostwatch-cut-{}.mp4", std::process::id()));
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let ran = run_until(&spec(path.to_str().unwrap()), |_| false);
    fs::remove_file(&path).unwrap();
    assert!(matches!(ran.end, End::Ended | End::Failed), "{:?}", ran.end);
    assert!(ran.frames().count() < 132);
}
