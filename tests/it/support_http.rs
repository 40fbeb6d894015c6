//! A small HTTP server: files with ranges, cameras' MJPEG, refusals.

use std::{
    io::{BufRead as _, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::support_tls::Shown;

/// What is at `/`; everything else is 404.
pub(crate) enum Content {
    /// A file, with ranges.
    File(Vec<u8>),
    /// JPEG pictures as parts of one endless answer, this long apart, then its end.
    Mjpeg(Vec<Vec<u8>>, Duration),
    /// A file, for whoever shows this user name and password as HTTP calls Basic.
    Protected(Vec<u8>, &'static str),
    /// This status.
    Status(&'static str),
}

/// A server that runs until it is dropped.
pub(crate) struct Server {
    port: u16,
    tls: bool,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(content: Content) -> Server {
        Server::start_on(content, None)
    }

    /// One that is reached by TLS only.
    pub(crate) fn start_tls(content: Content, shown: &Shown) -> Server {
        let chain = vec![CertificateDer::from_pem_slice(shown.certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(shown.key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Server::start_on(content, Some(Arc::new(config)))
    }

    fn start_on(content: Content, tls: Option<Arc<ServerConfig>>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, is_tls, content) = (stop.clone(), tls.is_some(), Arc::new(content));
        let accept = move || {
            for socket in listener.incoming().map(Result::unwrap) {
                if stopped.load(SeqCst) {
                    return;
                }
                let (content, tls, stopped) = (content.clone(), tls.clone(), stopped.clone());
                Builder::new()
                    .spawn(move || {
                        // A client may leave at any time.
                        drop(match tls {
                            None => answer(socket, &content, &stopped),
                            Some(config) => {
                                let tls = ServerConnection::new(config).unwrap();
                                answer(StreamOwned::new(tls, socket), &content, &stopped)
                            }
                        });
                    })
                    .unwrap();
            }
        };
        let thread = Some(Builder::new().spawn(accept).unwrap());
        Server { port, tls: is_tls, stop, thread }
    }

    pub(crate) fn url(&self) -> String {
        let s = if self.tls { "s" } else { "" };
        format!("http{s}://127.0.0.1:{}/", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // Wakes the listener.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        self.thread.take().unwrap().join().unwrap();
    }
}

fn answer(
    stream: impl Read + Write,
    content: &Content,
    stopped: &AtomicBool,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut first, mut range, mut line) = (String::new(), None, String::new());
        let mut shown = None;
        if stream.read_line(&mut first)? == 0 {
            return Ok(());
        }
        while 2 < stream.read_line(&mut line)? {
            let lower = line.to_ascii_lowercase();
            if let Some(bytes) = lower.strip_prefix("range: bytes=") {
                range = bytes.trim().split_once('-').map(|it| (it.0.to_owned(), it.1.to_owned()));
            }
            if lower.starts_with("authorization: basic ") {
                shown = line.split_whitespace().nth(2).map(str::to_owned);
            }
            line.clear();
        }
        let out = stream.get_mut();
        let found = first.split(' ').nth(1) == Some("/");
        match content {
            _ if !found => status(out, "404 Not Found")?,
            Content::Status(text) => status(out, text)?,
            Content::Protected(_, right) if shown.as_deref() != Some(&*basic(right)) => {
                status(out, "401 Unauthorized")?;
            }
            Content::File(bytes) | Content::Protected(bytes, _) => file(out, bytes, range)?,
            Content::Mjpeg(pictures, period) => return mjpeg(out, pictures, *period, stopped),
        }
    }
}

/// As it is in the header.
pub(crate) fn basic(user_and_password: &str) -> String {
    gio::glib::base64_encode(user_and_password.as_bytes()).to_string()
}

fn status(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    let ask =
        if text.starts_with("401") { "WWW-Authenticate: Basic realm=\"camera\"\r\n" } else { "" };
    write!(out, "HTTP/1.1 {text}\r\n{ask}Content-Length: 0\r\n\r\n")?;
    out.flush()
}

fn file(
    out: &mut impl Write,
    bytes: &[u8],
    range: Option<(String, String)>,
) -> std::io::Result<()> {
    let all = bytes.len();
    let (first, last, text) = match range {
        None => (0, all - 1, "200 OK".to_owned()),
        Some((first, last)) => {
            let first: usize = first.parse().unwrap();
            let last = last.parse().map_or(all - 1, |it: usize| it.min(all - 1));
            (
                first,
                last,
                format!("206 Partial Content\r\nContent-Range: bytes {first}-{last}/{all}"),
            )
        }
    };
    let part = &bytes[first..=last];
    let length = part.len();
    write!(
        out,
        "HTTP/1.1 {text}\r\nAccept-Ranges: bytes\r\nContent-Type: video/mp4\r\n\
         Content-Length: {length}\r\n\r\n"
    )?;
    out.write_all(part)?;
    out.flush()
}

/// As cheap cameras send it: no length of the whole, the boundary with its dashes in the header.
fn mjpeg(
    out: &mut impl Write,
    pictures: &[Vec<u8>],
    period: Duration,
    stopped: &AtomicBool,
) -> std::io::Result<()> {
    write!(
        out,
        "HTTP/1.0 200 OK\r\nConnection: close\r\nCache-Control: no-cache\r\n\
         Content-Type: multipart/x-mixed-replace;boundary=--myboundary\r\n\r\n"
    )?;
    for picture in pictures {
        if stopped.load(SeqCst) {
            return Ok(());
        }
        let length = picture.len();
        write!(
            out,
            "--myboundary\r\nContent-Type: image/jpeg\r\nContent-Length: {length}\r\n\r\n"
        )?;
        out.write_all(picture)?;
        out.write_all(b"\r\n")?;
        out.flush()?;
        std::thread::sleep(period);
    }
    Ok(())
}
