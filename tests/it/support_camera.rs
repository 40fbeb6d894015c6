//! A camera that answers RTSP requests with what a test tells it to, right or wrong.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    thread::Builder,
};

/// The answer to a request, from its status on, given its method: `None` for no answer.
pub(crate) type Script = fn(method: &str) -> Option<String>;

/// Starts one; it runs until the test's process ends. Gives its URL, which also takes the place of
/// `{url}` in an answer.
pub(crate) fn camera(script: Script) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("rtsp://{}/stream", listener.local_addr().unwrap());
    let own = url.clone();
    apart(move || {
        for client in listener.incoming() {
            let (client, own) = (client.unwrap(), own.clone());
            apart(move || {
                // A client may leave at any time.
                serve(&client, script, &own).ok();
            });
        }
    });
    url
}

fn serve(client: &TcpStream, script: Script, url: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(client).lines();
    let mut client = client;
    while let Some(first) = lines.next() {
        let first = first?;
        let method = first.split(' ').next().unwrap_or_default().to_owned();
        let mut sequence = String::new();
        for line in lines.by_ref() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            if line.to_ascii_lowercase().starts_with("cseq:") {
                sequence = line;
            }
        }
        if let Some(answer) = script(&method).map(|it| it.replace("{url}", url)) {
            let (status, rest) = answer.split_once("\r\n").unwrap_or((&answer, "\r\n"));
            write!(client, "RTSP/1.0 {status}\r\n{sequence}\r\n{rest}")?;
        }
    }
    Ok(())
}

/// An answer with this session description.
pub(crate) fn described(sdp: &str) -> String {
    let length = sdp.len();
    format!("200 OK\r\nContent-Type: application/sdp\r\nContent-Length: {length}\r\n\r\n{sdp}")
}

/// The start of every session description.
pub(crate) const SDP: &str = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=\x1b[31mcamera\r\nt=0 0\r\n";

/// A track of H.264.
pub(crate) const H264: &str =
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:track1\r\n";

fn apart(body: impl FnOnce() + Send + 'static) {
    drop(Builder::new().name("camera".into()).spawn(body).unwrap());
}
