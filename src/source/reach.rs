//! Whether a host answers at all.

use std::{
    io::ErrorKind,
    net::{TcpStream, ToSocketAddrs as _},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::frame::Code;

/// Longest time for a host to take a connection.
pub const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Longest wait before the stop token is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Looks up `host` and connects to it once, on a thread of its own: neither can be stopped.
///
/// # Errors
/// [`Code::Dns`], [`Code::Refused`], [`Code::Timeout`], or [`Code::Error`] with what the system
/// says; also when `stop` fires.
pub fn reach(host: &str, port: u16, stop: &CancellationToken) -> Result<(), (Code, String)> {
    let (done, answer) = sync_channel(1);
    let host = host.to_owned();
    let ask = move || {
        // Nobody listens any more iff the stream was stopped.
        drop(done.send(connect(&host, port)));
    };
    thread::Builder::new()
        .name("reach".to_owned())
        .spawn(ask)
        .map_err(|it| (Code::Error, format!("no thread to connect on: {it}")))?;
    let deadline = Instant::now() + 2 * ANSWER_MAX;
    loop {
        match answer.recv_timeout(LOOK) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Timeout) if stop.is_cancelled() => {
                return Err((Code::Error, "stopped".to_owned()));
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => return Err((Code::Dns, "looking up the host takes too long".to_owned())),
        }
    }
}

fn connect(host: &str, port: u16) -> Result<(), (Code, String)> {
    let addresses = (host, port).to_socket_addrs().map_err(|it| (Code::Dns, it.to_string()))?;
    let mut last = (Code::Dns, "the name has no address".to_owned());
    let deadline = Instant::now() + ANSWER_MAX;
    for address in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(_) => return Ok(()),
            Err(error) => {
                let code = match error.kind() {
                    ErrorKind::ConnectionRefused => Code::Refused,
                    ErrorKind::TimedOut => Code::Timeout,
                    _ => Code::Error,
                };
                last = (code, error.to_string());
            }
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_host_that_listens_refuses_or_is_unknown_is_told_apart() {
        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(reach("127.0.0.1", port, &stop), Ok(()));
        drop(listener);
        assert_eq!(reach("127.0.0.1", port, &stop).unwrap_err().0, Code::Refused);
        assert_eq!(reach("no-such-host.invalid", 554, &stop).unwrap_err().0, Code::Dns);
    }

    #[test]
    fn a_stop_does_not_wait_for_a_host_that_is_silent() {
        let stop = CancellationToken::new();
        stop.cancel();
        let start = Instant::now();
        // Reserved for documentation: nobody has this address.
        assert!(reach("192.0.2.1", 554, &stop).is_err());
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
}
