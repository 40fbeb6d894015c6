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

/// Longest wait before the stop token is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Looks up `host` and connects to it once within about `most`, on a thread of its own: neither can
/// be stopped.
///
/// # Errors
/// [`Code::Dns`], [`Code::Refused`], [`Code::Timeout`], or [`Code::Error`] with what the system
/// says; also when `stop` fires.
pub fn reach(
    (host, port): (&str, u16),
    most: Duration,
    stop: &CancellationToken,
) -> Result<(), (Code, String)> {
    let (done, answer) = sync_channel(1);
    let host = host.to_owned();
    let ask = move || {
        // Nobody listens any more iff the stream was stopped.
        drop(done.send(connect(&host, port, most)));
    };
    thread::Builder::new()
        .name("reach".to_owned())
        .spawn(ask)
        .map_err(|it| (Code::Error, format!("no thread to connect on: {it}")))?;
    let deadline = Instant::now() + 2 * most;
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

fn connect(host: &str, port: u16, most: Duration) -> Result<(), (Code, String)> {
    let addresses = (host, port).to_socket_addrs().map_err(|it| (Code::Dns, it.to_string()))?;
    let addresses: Vec<_> = addresses.collect();
    let mut last = (Code::Dns, "the name has no address".to_owned());
    let deadline = Instant::now() + most;
    for (i, address) in addresses.iter().enumerate() {
        // A share for each: a name may have an address that leads nowhere from here.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - i) as u32;
        match TcpStream::connect_timeout(address, share.max(LOOK)) {
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

    const MOST: Duration = Duration::from_secs(5);

    #[test]
    fn a_host_that_listens_refuses_or_is_unknown_is_told_apart() {
        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(reach(("127.0.0.1", port), MOST, &stop), Ok(()));
        drop(listener);
        assert_eq!(reach(("127.0.0.1", port), MOST, &stop).unwrap_err().0, Code::Refused);
        assert_eq!(reach(("no-such-host.invalid", 554), MOST, &stop).unwrap_err().0, Code::Dns);
    }

    #[test]
    fn a_stop_does_not_wait_for_a_host_that_is_silent() {
        let stop = CancellationToken::new();
        stop.cancel();
        let start = Instant::now();
        // Reserved for documentation: nobody has this address.
        assert!(reach(("192.0.2.1", 554), MOST, &stop).is_err());
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
}
