//! Cameras that come back together and recorders with many channels are not stormed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::{
    end_to_end::{configure, drain, events, signal, start},
    support::{wait_until, within},
    support_camera::{H264, SDP, described},
};

/// What has been seen of those that connected.
#[derive(Debug, Default)]
struct Seen {
    /// Connections that asked something and were not answered yet, and the most of them at once.
    open: usize,
    open_max: usize,
    /// How often each address was asked.
    asked: BTreeMap<IpAddr, u32>,
    /// Requests with a password.
    signed_in: usize,
    /// The URLs that were played, each with the nonce that it was signed in with.
    played: Vec<(String, String)>,
}

/// Listens on every address of the loopback and serves each connection on a thread of its own;
/// gives the port. The threads end with the process.
fn listen(serve: fn(TcpStream, &Mutex<Seen>)) -> (u16, Arc<Mutex<Seen>>) {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(Mutex::default());
    let shared = seen.clone();
    let accept = move || {
        for stream in listener.incoming() {
            let (stream, shared) = (stream.unwrap(), shared.clone());
            drop(thread::Builder::new().spawn(move || serve(stream, &shared)).unwrap());
        }
    };
    drop(thread::Builder::new().name("server".into()).spawn(accept).unwrap());
    (port, seen)
}

/// One RTSP request, as its lines.
fn request(stream: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            return Some(lines);
        }
        lines.push(line);
    }
}

/// Takes 300 ms to say nothing.
fn slow(stream: TcpStream, seen: &Mutex<Seen>) {
    let address = stream.local_addr().unwrap().ip();
    let mut stream = BufReader::new(stream);
    // A connection that only asks whether the host answers sends nothing.
    if request(&mut stream).is_none() {
        return;
    }
    {
        let mut seen = seen.lock().unwrap();
        *seen.asked.entry(address).or_default() += 1;
        seen.open += 1;
        seen.open_max = seen.open_max.max(seen.open);
    }
    // This is how slow the camera is, not waiting for something to happen.
    thread::sleep(Duration::from_millis(300));
    seen.lock().unwrap().open -= 1;
}

/// Refuses every password.
fn refusing(stream: TcpStream, seen: &Mutex<Seen>) {
    let mut output = stream.try_clone().unwrap();
    let mut stream = BufReader::new(stream);
    while let Some(lines) = request(&mut stream) {
        let sequence = lines.iter().find(|it| it.starts_with("CSeq")).unwrap();
        if lines.iter().any(|it| it.starts_with("Authorization")) {
            seen.lock().unwrap().signed_in += 1;
        }
        let answer = format!(
            "RTSP/1.0 401 Unauthorized\r\n{sequence}WWW-Authenticate: Basic realm=\"r\"\r\n\r\n"
        );
        if output.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// What a request says, to the server.
struct Request {
    method: String,
    url: String,
    sequence: String,
    /// `None` iff it has no password.
    authorization: Option<String>,
}

impl Request {
    fn read(stream: &mut BufReader<TcpStream>) -> Option<Request> {
        let lines = request(stream)?;
        let mut words = lines.first()?.split(' ').map(str::to_owned);
        let header = |name: &str| lines.iter().find(|it| it.starts_with(name)).cloned();
        Some(Request {
            method: words.next()?,
            url: words.next()?,
            sequence: header("CSeq")?,
            authorization: header("Authorization"),
        })
    }

    /// The quoted value of a parameter of its authorization.
    fn parameter(&self, name: &str) -> String {
        let text = self.authorization.as_deref().unwrap_or_default();
        let value = text.split_once(&format!("{name}=\"")).map_or("", |it| it.1);
        value.split('"').next().unwrap().to_owned()
    }

    /// The answer of a server that takes the request; there are no pictures.
    fn taken(&self) -> String {
        match &*self.method {
            "DESCRIBE" => described(&format!("{SDP}{H264}")),
            "SETUP" => "200 OK\r\nSession: 1\r\n\
                 Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n"
                .to_owned(),
            "OPTIONS" => "200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n".to_owned(),
            _ => "200 OK\r\nSession: 1\r\n\r\n".to_owned(),
        }
    }

    fn answer(&self, output: &mut TcpStream, answer: &str) -> Option<()> {
        let (status, rest) = answer.split_once("\r\n").unwrap();
        write!(output, "RTSP/1.0 {status}\r\n{}{rest}", self.sequence).ok()
    }
}

/// Serves requests until the client has gone.
fn serve(stream: TcpStream, mut answer: impl FnMut(&Request) -> String) {
    let mut output = stream.try_clone().unwrap();
    let mut stream = BufReader::new(stream);
    while let Some(request) = Request::read(&mut stream) {
        let text = answer(&request);
        if request.answer(&mut output, &text).is_none() {
            return;
        }
    }
}

/// Wants Digest, and after the description another nonce than before.
fn stale(stream: TcpStream, seen: &Mutex<Seen>) {
    let mut nonce = "first";
    serve(stream, |it| {
        if it.method == "SETUP" {
            nonce = "second";
        }
        let given = it.parameter("nonce");
        if it.method == "OPTIONS" || given == nonce {
            if it.method == "PLAY" {
                seen.lock().unwrap().played.push((it.url.clone(), given));
            }
            return it.taken();
        }
        let stale = if given.is_empty() { "" } else { ", stale=true" };
        format!(
            "401 Unauthorized\r\n\
             WWW-Authenticate: Digest realm=\"r\", nonce=\"{nonce}\"{stale}\r\n\r\n"
        )
    });
}

/// Takes every password, but forbids one channel.
fn forbidding(stream: TcpStream, seen: &Mutex<Seen>) {
    serve(stream, |it| {
        if it.authorization.is_none() && it.method != "OPTIONS" {
            return "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"r\"\r\n\r\n".to_owned();
        }
        if it.url.contains("/office") && it.method != "OPTIONS" {
            return "403 Forbidden\r\n\r\n".to_owned();
        }
        if it.method == "PLAY" {
            seen.lock().unwrap().played.push((it.url.clone(), String::new()));
        }
        it.taken()
    });
}

#[test]
fn a_nonce_that_grows_old_in_a_session_is_no_refusal() {
    let (port, seen) = listen(stale);
    let folder = tempfile::tempdir().unwrap();
    let url = format!("rtsp://127.0.0.1:{port}/ch1");
    configure(
        folder.path(),
        &format!("  c: {{url: \"{url}\", username: viewer, password: right}}\n"),
    );
    let child = start(folder.path());
    wait_until("it plays", || !seen.lock().unwrap().played.is_empty());
    drain(child, folder.path());
    assert_eq!(seen.lock().unwrap().played[0].1, "second");
    let codes: Vec<_> = events(folder.path()).iter().map(|it| it["data"]["code"].clone()).collect();
    assert!(!codes.contains(&"auth".into()), "{codes:?}");
}

#[test]
fn one_forbidden_channel_of_a_recorder_stops_no_other() {
    let (port, seen) = listen(forbidding);
    let folder = tempfile::tempdir().unwrap();
    let stream = |id: &str| {
        format!(
            "  {id}: {{url: \"rtsp://127.0.0.1:{port}/{id}\", username: viewer, password: right}}\n"
        )
    };
    // At first it is the only one, so that nothing has shown that the password is right.
    let office = stream("office");
    configure(folder.path(), &office);
    let path = folder.path().join("config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let child = start(folder.path());
    let log = || fs::read_to_string(folder.path().join("log")).unwrap();
    wait_until("the office is forbidden", || log().contains(r#""code":"auth""#));
    let others: String = ["door", "gate", "yard"].iter().map(|it| stream(it)).collect();
    fs::write(&path, text.replace(&office, &(office.clone() + &others))).unwrap();
    signal(&child, "HUP");
    wait_until("the others play", || {
        let seen = seen.lock().unwrap();
        let plays = |id: &&str| seen.played.iter().any(|it| it.0.contains(*id));
        ["/door", "/gate", "/yard"].iter().all(plays)
    });
    drain(child, folder.path());
    let events = events(folder.path());
    let refused: BTreeSet<_> = events
        .iter()
        .filter(|it| it["data"]["code"] == "auth")
        .map(|it| it["subject"].as_str().unwrap())
        .collect();
    assert_eq!(refused, BTreeSet::from(["office"]));
}

#[test]
fn of_64_cameras_that_come_back_at_once_eight_connect_at_the_same_time() {
    let (port, seen) = listen(slow);
    let folder = tempfile::tempdir().unwrap();
    let streams: String =
        (1..=64).map(|it| format!("  c{it}: {{url: \"rtsp://127.0.0.{it}:{port}/\"}}\n")).collect();
    configure(folder.path(), &streams);
    let child = start(folder.path());
    let deadline = within(60_000);
    while seen.lock().unwrap().asked.len() < 64 {
        assert!(Instant::now() < deadline, "{:?}", seen.lock().unwrap());
        // The rate of looking, not waiting for something to happen.
        thread::sleep(Duration::from_millis(10));
    }
    drain(child, folder.path());
    let seen = seen.lock().unwrap();
    println!("at most {} at once; asked {} times", seen.open_max, seen.asked.values().sum::<u32>());
    assert!((2..=8).contains(&seen.open_max), "{seen:?}");
}

#[test]
fn one_of_16_channels_of_a_recorder_tries_a_wrong_password() {
    let (port, seen) = listen(refusing);
    let folder = tempfile::tempdir().unwrap();
    let streams: String = (1..=16)
        .map(|it| {
            format!(
                "  c{it}: {{url: \"rtsp://127.0.0.1:{port}/ch{it}\", username: viewer, \
                 password: wrong}}\n"
            )
        })
        .collect();
    configure(folder.path(), &streams);
    let child = start(folder.path());
    let failed = || {
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        log.lines().filter(|it| it.contains(r#""code":"auth""#)).count()
    };
    wait_until("every channel knows", || failed() == 16);
    drain(child, folder.path());
    // The second would be in order if the camera's challenge had grown old.
    assert_eq!(seen.lock().unwrap().signed_in, 2);
    let events = events(folder.path());
    let of = |text: &str| {
        let says = |it: &&serde_json::Value| {
            it["data"]["detail"].as_str().is_some_and(|it| it.contains(text))
        };
        events.iter().filter(says).count()
    };
    assert_eq!(of("not tried: another stream of this host was refused"), 15);
}
