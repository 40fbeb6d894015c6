//! The sink for webhooks against receivers that behave badly.

use std::{
    io::{self, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use ghostwatch::{
    secret::Secret,
    sink::{
        broker::{Broker as _, Code, Message},
        settings::{Login, Tls, Webhook as Settings},
        webhook::Webhook,
    },
};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::{
    support::wait_until,
    support_server::{code, deliver, deliver_all, messages, run, sized},
    support_tls::Files,
};

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    line: String,
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Seen {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|it| it.0.eq_ignore_ascii_case(name));
        found.map_or("", |it| it.1.as_str())
    }
}

/// What a receiver does with a request.
pub(crate) enum Do {
    /// Answers with these lines after `HTTP/1.1 ` and this body.
    Answer(&'static str, String),
    /// Takes the request and closes in the middle of the answer.
    Reset,
    /// Answers that all is well, but only after so long.
    Late(Duration),
}

pub(crate) fn ok() -> Do {
    Do::Answer("204 No Content", String::new())
}

/// A receiver that takes each connection, and each request on it, in a thread of its own.
pub(crate) struct Receiver {
    pub(crate) port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Receiver {
    /// `plan` gets how many requests came before, and the request.
    pub(crate) fn start(
        tls: Option<Arc<ServerConfig>>,
        plan: impl Fn(usize, &Seen) -> Do + Send + Sync + 'static,
    ) -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let (plan, all) = (Arc::new(plan), seen.clone());
        spawn(move || {
            for stream in listener.incoming() {
                let (plan, all, tls) = (plan.clone(), all.clone(), tls.clone());
                let stream = stream.unwrap();
                spawn(move || match tls {
                    Some(config) => {
                        let connection = ServerConnection::new(config).unwrap();
                        serve(StreamOwned::new(connection, stream), &all, &*plan)
                    }
                    None => serve(stream, &all, &*plan),
                });
            }
        });
        Receiver { port, seen }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn keys(&self) -> Vec<String> {
        self.seen().iter().map(|it| it.header("idempotency-key").to_owned()).collect()
    }
}

/// A thread of the receiver's; it ends with the process.
fn spawn(body: impl FnOnce() + Send + 'static) {
    drop(thread::Builder::new().spawn(body).unwrap());
}

/// Serves one connection until it ends, however it ends.
fn serve(stream: impl Read + Write, all: &Mutex<Vec<Seen>>, plan: &dyn Fn(usize, &Seen) -> Do) {
    let mut stream = BufReader::new(stream);
    while let Ok(request) = read(&mut stream) {
        let count = {
            let mut all = all.lock().unwrap();
            all.push(request.clone());
            all.len() - 1
        };
        let text = match plan(count, &request) {
            Do::Answer(head, body) => {
                format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            }
            Do::Reset => {
                // The client sees an end in the middle of the head.
                stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\nconte").ok();
                return;
            }
            Do::Late(time) => {
                thread::sleep(time);
                "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned()
            }
        };
        let out = stream.get_mut();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

fn read(stream: &mut impl io::BufRead) -> io::Result<Seen> {
    let mut seen = Seen::default();
    if stream.read_line(&mut seen.line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        seen.headers.push((name.to_owned(), value.to_owned()));
    }
    let mut body = vec![0; seen.header("content-length").parse().unwrap_or(0)];
    stream.read_exact(&mut body)?;
    seen.body = String::from_utf8(body).unwrap();
    Ok(seen)
}

pub(crate) fn settings(url: &str) -> Settings {
    Settings {
        url: Secret::new(url),
        headers: Vec::new(),
        login: Login::default(),
        batch_events: 100,
        batch_bytes: 1 << 20,
        tls: Tls::default(),
        connect_timeout: Duration::from_secs(5),
        timeout: Duration::from_millis(500),
    }
}

fn webhook(receiver: &Receiver) -> Webhook {
    Webhook::new(settings(&format!("http://127.0.0.1:{}/in?token=t0ken", receiver.port))).unwrap()
}

fn lines(messages: &[Message]) -> String {
    messages.iter().map(|it| format!("{}\n", it.json)).collect()
}

#[test]
fn events_come_in_batches_with_their_key_and_our_headers() {
    let receiver = Receiver::start(None, |_, _| ok());
    let url = format!("http://127.0.0.1:{}/in?token=t0ken", receiver.port);
    let mut settings = settings(&url);
    settings.login.token = Some(Secret::new("bear"));
    settings.headers = vec![("X-Site".to_owned(), Secret::new("north"))];
    let mut broker = Webhook::new(settings).unwrap();
    let sent = messages(1..=250);
    run(async {
        broker.connect().await.unwrap();
        let (acked, result) = deliver(&mut broker, &sent).await;
        result.unwrap();
        assert_eq!(acked, vec![false; 250]);
    });
    let seen = receiver.seen();
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[0].line, "POST /in?token=t0ken HTTP/1.1\r\n");
    assert_eq!(seen[0].header("host"), format!("127.0.0.1:{}", receiver.port));
    assert_eq!(seen[0].header("content-type"), "application/x-ndjson");
    assert_eq!(seen[0].header("authorization"), "Bearer bear");
    assert_eq!(seen[0].header("x-site"), "north");
    let id = |seq: u64| format!("4f2c9a71d0e3b586-{seq}");
    assert_eq!(seen[0].header("idempotency-key"), format!("{}-{}", id(1), id(100)));
    assert_eq!(seen[2].header("idempotency-key"), format!("{}-{}", id(201), id(250)));
    let bodies = seen.iter().map(|it| it.body.as_str()).collect::<String>();
    assert_eq!(bodies, lines(&sent));
}

#[test]
fn a_batch_has_no_more_bytes_than_it_may() {
    let receiver = Receiver::start(None, |_, _| ok());
    let mut settings = settings(&format!("http://127.0.0.1:{}", receiver.port));
    settings.batch_bytes = 2200;
    let mut broker = Webhook::new(settings).unwrap();
    let mut sent = messages(1..=8);
    sent[4] = sized(5, 5000);
    run(async { deliver(&mut broker, &sent).await.1.unwrap() });
    let counts = receiver.seen().iter().map(|it| it.body.lines().count()).collect::<Vec<_>>();
    assert_eq!(counts, [3, 1, 1, 3]);
}

#[test]
fn an_acknowledgement_that_is_lost_brings_the_same_key_again() {
    // The second request is taken and answered late, the fourth is answered by half.
    let receiver = Receiver::start(None, |count, _| match count {
        1 => Do::Late(Duration::from_millis(900)),
        3 | 4 => Do::Reset,
        _ => ok(),
    });
    let mut broker = webhook(&receiver);
    let sent = messages(1..=350);
    run(async {
        // More events come in before the retry, which must not change the batch.
        let (acked, result) = deliver(&mut broker, &sent[..150]).await;
        assert_eq!((acked.len(), code(result)), (100, Code::Timeout));
        let rest = &sent[100..];
        let done = deliver_all(&mut broker, rest, |_| (), |_| ()).await;
        assert_eq!(done.faults.iter().map(|it| it.code).collect::<Vec<_>>(), [Code::Error]);
    });
    let keys = receiver.keys();
    let ends = |from: u64, to: u64| format!("4f2c9a71d0e3b586-{from}-4f2c9a71d0e3b586-{to}");
    // A connection that was kept is given a second try at once.
    let third = ends(151, 250);
    let wanted = [
        ends(1, 100),
        ends(101, 150),
        ends(101, 150),
        third.clone(),
        third.clone(),
        third,
        ends(251, 350),
    ];
    assert_eq!(keys, wanted);
}

#[test]
fn answers_mean_what_http_says() {
    let answers = [
        ("500 Oh", Code::Error, None),
        ("503 Busy\r\nretry-after: 7", Code::Error, Some(7)),
        ("429 Slow\r\nretry-after: 3600", Code::Full, Some(60)),
        ("408 Late", Code::Timeout, None),
        ("507 Full", Code::Full, None),
        ("401 Who", Code::Auth, None),
        ("403 No", Code::Auth, None),
        ("404 Where", Code::NotFound, None),
        ("410 Gone", Code::NotFound, None),
        ("302 Found\r\nlocation: http://127.0.0.1:1/", Code::Error, None),
        ("400 Bad", Code::Error, None),
    ];
    let heads = answers.map(|it| it.0);
    let receiver = Receiver::start(None, move |count, _| match heads.get(count) {
        Some(head) => Do::Answer(head, "because\n\u{1b}[31m".to_owned()),
        None => ok(),
    });
    let mut broker = webhook(&receiver);
    run(async {
        for (head, code, secs) in answers {
            let (acked, result) = deliver(&mut broker, &messages(1..=3)).await;
            let fault = result.unwrap_err();
            assert_eq!((acked.len(), fault.code), (0, code), "{head}: {fault}");
            assert_eq!(fault.retry_after, secs.map(Duration::from_secs), "{head}");
            let said = fault.to_string();
            assert!(said.contains(r"because\n\u{1b}[31m"), "{said}");
            assert!(!said.contains("t0ken"), "{said}");
        }
        deliver(&mut broker, &messages(1..=3)).await.1.unwrap();
    });
    assert_eq!(receiver.seen().len(), answers.len() + 1);
}

#[test]
fn a_batch_that_is_too_large_is_split_down_to_the_one_that_is() {
    let receiver = Receiver::start(None, |_, seen| {
        if seen.body.len() > 9000 { Do::Answer("413 Large", String::new()) } else { ok() }
    });
    let mut broker = webhook(&receiver);
    let mut sent = messages(1..=60);
    sent[41] = sized(42, 10_000);
    run(async {
        let (acked, result) = deliver(&mut broker, &sent).await;
        assert_eq!((acked.len(), code(result)), (41, Code::TooLarge));
        deliver(&mut broker, &sent[42..]).await.1.unwrap();
    });
    sent.remove(41);
    let taken = receiver.seen().into_iter().filter(|it| it.body.len() <= 9000);
    assert_eq!(taken.map(|it| it.body).collect::<String>(), lines(&sent));
}

#[test]
fn an_answer_without_end_costs_no_memory_and_counts() {
    let receiver = Receiver::start(None, |_, _| Do::Answer("200 OK", "x".repeat(20 << 20)));
    let mut broker = webhook(&receiver);
    run(async {
        for _ in 0..2 {
            deliver(&mut broker, &messages(1..=3)).await.1.unwrap();
        }
    });
}

#[test]
fn nobody_there_is_refused_and_a_port_that_says_nothing_a_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut broker = Webhook::new(settings(&format!("http://127.0.0.1:{port}/"))).unwrap();
    run(async {
        broker.connect().await.unwrap();
        let start = Instant::now();
        assert_eq!(code(deliver(&mut broker, &messages(1..=3)).await.1), Code::Timeout);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        drop(listener);
        assert_eq!(code(broker.connect().await), Code::Refused);
        let nowhere = settings("http://no.such.name.invalid/");
        assert_eq!(code(Webhook::new(nowhere).unwrap().connect().await), Code::Dns);
    });
}

#[test]
fn a_connection_closed_between_two_batches_is_no_fault() {
    // It closes each connection after one answer, without saying so before.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, closed) = mpsc::channel();
    spawn(move || {
        for stream in listener.incoming() {
            let mut stream: BufReader<TcpStream> = BufReader::new(stream.unwrap());
            if read(&mut stream).is_ok() {
                stream.get_mut().write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
                drop(stream);
                tell.send(()).unwrap();
            }
        }
    });
    let mut broker = Webhook::new(settings(&format!("http://127.0.0.1:{port}/"))).unwrap();
    run(async {
        broker.connect().await.unwrap();
        for _ in 0..3 {
            deliver(&mut broker, &messages(1..=3)).await.1.unwrap();
            closed.recv().unwrap();
        }
    });
}

#[test]
fn tls_is_used_and_a_stranger_is_not_trusted() {
    let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (authority, stranger) = (Files::write(ours.path()), Files::write(other.path()));
    let certificates = vec![CertificateDer::from_pem_file(&authority.cert).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&authority.key).unwrap();
    let config =
        ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
    let receiver = Receiver::start(Some(Arc::new(config)), |_, _| ok());
    let with = |ca: Option<&Files>| {
        let mut settings = settings(&format!("https://localhost:{}/", receiver.port));
        settings.tls.ca_file = ca.map(|it| it.ca.clone());
        Webhook::new(settings).unwrap()
    };
    run(async {
        let mut broker = with(Some(&authority));
        broker.connect().await.unwrap();
        deliver(&mut broker, &messages(1..=300)).await.1.unwrap();
        assert_eq!(code(with(Some(&stranger)).connect().await), Code::Tls);
        assert_eq!(code(with(None).connect().await), Code::Tls);
    });
    wait_until("three batches", || receiver.seen().len() == 3);
}

#[test]
fn a_url_that_cannot_be_used_is_refused_without_showing_it() {
    for url in ["ftp://h/s3cret", "/s3cret", "http://u:s3cret@h/", "http://h /s3cret", ""] {
        let said = Webhook::new(settings(url)).unwrap_err().to_string();
        assert!(!said.contains("s3cret"), "{said}");
    }
    let mut bad = settings("http://h/");
    bad.headers = vec![("X-Key".to_owned(), Secret::new("s3cret\r\nX-More: 1"))];
    let said = Webhook::new(bad).unwrap_err().to_string();
    assert!(said.contains("X-Key") && !said.contains("s3cret"), "{said}");
}
