//! Real servers, each a process of its own on a port of its own, that can be hurt.

use std::{
    cell::RefCell,
    ffi::OsString,
    fs::{self, File},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering::SeqCst},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::wait_until;

/// A port that nothing listens on. Below the ports that the kernel gives to connections, so that
/// none of them takes it while its server is down.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let nth = NEXT.fetch_add(1, SeqCst);
        // Two runs of the tests at once start at different places.
        let start = std::process::id().wrapping_mul(37) % 20_000;
        let port = 10_000 + (start as u16 + nth) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A server's process. Killed when it is dropped.
pub(crate) struct Server {
    name: &'static str,
    program: PathBuf,
    args: Vec<OsString>,
    pub(crate) port: u16,
    child: Option<Child>,
    log: PathBuf,
}

impl Server {
    /// Starts `program` with `args`, which say that it listens on `port`, and waits until it does.
    /// What it prints goes to `name.log` in `folder`, and is shown if it does not start.
    pub(crate) fn start(
        name: &'static str,
        program: impl AsRef<Path>,
        args: impl IntoIterator<Item = impl Into<OsString>>,
        port: u16,
        folder: &Path,
    ) -> Server {
        let args = args.into_iter().map(Into::into).collect();
        let log = folder.join(format!("{name}.log"));
        let program = program.as_ref().to_owned();
        let mut it = Server { name, program, args, port, child: None, log };
        it.restart();
        it
    }

    /// Starts it again, on the same port and with the same data.
    pub(crate) fn restart(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let missing = |error| {
            let program = self.program.display();
            panic!("starting {program} ({}): {error}; scripts/setup test installs it", self.name)
        };
        let child = RefCell::new(child.unwrap_or_else(missing));
        wait_until("the server listens", || {
            if let Some(status) = child.borrow_mut().try_wait().unwrap() {
                panic!("{} ended with {status}:\n{}", self.name, self.printed());
            }
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
        self.child = Some(child.into_inner());
    }

    /// What it has printed so far.
    pub(crate) fn printed(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// SIGKILL, and waits for its end.
    #[allow(
        dead_code,
        reason = "Mosquitto loses acknowledged messages by it, other brokers do not"
    )]
    pub(crate) fn kill(&mut self) {
        self.end(Signal::KILL);
    }

    /// SIGTERM, and waits for its end.
    pub(crate) fn stop(&mut self) {
        self.end(Signal::TERM);
    }

    /// SIGSTOP: it takes connections, as far as the kernel does, and answers nothing.
    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn end(&mut self, signal: Signal) {
        self.signal(signal);
        self.child.take().expect("`signal` has seen it").wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name));
        kill_process(Pid::from_child(child), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGKILL ends it in any state, also after SIGSTOP.
            child.kill().ok();
            child.wait().ok();
        }
    }
}
