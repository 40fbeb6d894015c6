//! Tells systemd how the daemon is (`sd_notify(3)`), and how often it wants to hear that it lives.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{ffi::OsStrExt as _, net::SocketAddr, net::UnixDatagram},
    },
    process,
    time::Duration,
};

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};

/// The way to systemd; leads nowhere when nobody listens.
#[derive(Debug, Default)]
pub struct Notifier {
    /// `None` iff systemd has not asked to be told.
    socket: Option<UnixDatagram>,
}

impl Notifier {
    /// Takes `$NOTIFY_SOCKET`, as systemd sets it for `Type=notify`.
    ///
    /// # Errors
    /// It is set, but to nothing that can be sent to.
    pub fn from_env() -> anyhow::Result<Notifier> {
        match env::var_os("NOTIFY_SOCKET") {
            Some(name) => Notifier::to(&name),
            None => Ok(Notifier::default()),
        }
    }

    /// Sends to a socket named as in `$NOTIFY_SOCKET`: a path, or `@` and an abstract name.
    ///
    /// # Errors
    /// There is no such socket.
    pub fn to(name: &OsStr) -> anyhow::Result<Notifier> {
        let open = || -> io::Result<UnixDatagram> {
            let addr = match name.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
                [b'/', ..] => SocketAddr::from_pathname(name)?,
                _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
            };
            let socket = UnixDatagram::unbound()?;
            // A supervisor that does not read must not stop us.
            socket.set_nonblocking(true)?;
            socket.connect_addr(&addr)?;
            Ok(socket)
        };
        let socket = open().with_context(|| format!("opening NOTIFY_SOCKET {}", name.display()))?;
        Ok(Notifier { socket: Some(socket) })
    }

    /// Start-up is over.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// The configuration is being read again; [`Notifier::ready`] ends that.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The daemon is draining.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The daemon lives.
    pub fn watchdog(&self) {
        self.send("WATCHDOG=1");
    }

    /// One line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.send(&format!("STATUS={}", line.replace('\n', " ")));
    }

    fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        // A lost message is not an error of ours: systemd acts on what it does not hear.
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::debug!(%error, message, "systemd was not told");
        }
    }
}

/// How often systemd must hear that this process lives; `None` if it does not watch. Tell it twice
/// as often.
pub fn watchdog_interval() -> Option<Duration> {
    let (usec, pid) = (env::var("WATCHDOG_USEC").ok(), env::var("WATCHDOG_PID").ok());
    interval(usec.as_deref(), pid.as_deref(), process::id())
}

fn interval(usec: Option<&str>, pid: Option<&str>, own: u32) -> Option<Duration> {
    // Set for another process if our parent has handed its environment down.
    if pid.is_some_and(|it| it.parse() != Ok(own)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok()?;
    (0 < usec).then(|| Duration::from_micros(usec))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn systemd_hears_every_message_on_an_abstract_socket() {
        let name = format!("ghostwatch-test-{}", process::id());
        let addr = SocketAddr::from_abstract_name(&name).unwrap();
        let systemd = UnixDatagram::bind_addr(&addr).unwrap();
        let notifier = Notifier::to(OsStr::new(&format!("@{name}"))).unwrap();
        notifier.ready();
        assert_eq!(heard(&systemd), "READY=1");
        notifier.status("2 streams\nREADY=0");
        assert_eq!(heard(&systemd), "STATUS=2 streams READY=0");
        notifier.watchdog();
        assert_eq!(heard(&systemd), "WATCHDOG=1");
        notifier.reloading();
        let reloading = heard(&systemd);
        let micros = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(0 < micros.parse::<u64>().unwrap());
        notifier.stopping();
        assert_eq!(heard(&systemd), "STOPPING=1");
    }

    #[test]
    fn systemd_hears_on_a_socket_in_the_file_system_too() {
        let name = format!("ghostwatch-notify-{}.sock", process::id());
        let path = env::temp_dir().join(name);
        let systemd = UnixDatagram::bind(&path).unwrap();
        Notifier::to(path.as_os_str()).unwrap().ready();
        assert_eq!(heard(&systemd), "READY=1");
        drop(systemd);
        std::fs::remove_file(&path).unwrap();
        assert!(Notifier::to(path.as_os_str()).is_err());
        assert!(Notifier::to(OsStr::new("relative")).is_err());
    }

    #[test]
    fn the_watchdog_is_fed_only_if_it_watches_this_process() {
        let check = |usec, pid, want: Option<u64>| {
            assert_eq!(interval(usec, pid, 7), want.map(Duration::from_millis), "{usec:?} {pid:?}");
        };
        check(Some("30000000"), Some("7"), Some(30_000));
        check(Some("30000000"), None, Some(30_000));
        check(Some("30000000"), Some("8"), None);
        check(Some("0"), None, None);
        check(Some("soon"), None, None);
        check(None, Some("7"), None);
    }
}
