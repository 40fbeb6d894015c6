//! Cameras that come back together and recorders with many channels are not stormed.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::{
    end_to_end::{configure, drain, events, start},
    support::{wait_until, within},
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
