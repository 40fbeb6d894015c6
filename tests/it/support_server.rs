//! Real servers in processes of their own, and what a sink does with them.

use std::{
    fs::File,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use ghostwatch::sink::broker::{Acks, Broker, Code, Fault, Message, Topic};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{
    support::{wait_until, within},
    support_broker::free_port,
};

/// A server with a port and a data folder of its own, killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

impl Server {
    /// Prepares a server that does not run yet; `arguments` gets the port and the folder.
    pub(crate) fn new(
        program: impl Into<PathBuf>,
        arguments: impl FnOnce(u16, &Path) -> Vec<String>,
    ) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let arguments = arguments(port, folder.path());
        Server { program: program.into(), arguments, folder, port, child: None }
    }

    /// Runs it, again with the same port and data, and waits until it listens.
    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = File::create(self.log()).unwrap();
        let started = Command::new(&self.program)
            .args(&self.arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let hint = "scripts/setup test installs it";
        let child = started.unwrap_or_else(|it| panic!("{}: {it}; {hint}", self.program.display()));
        self.child = Some(child);
        let port = self.port;
        let listens = || TcpStream::connect(("127.0.0.1", port)).is_ok();
        let what =
            format!("{} listens; it said in {}", self.program.display(), self.log().display());
        wait_until(&what, listens);
    }

    /// A started one.
    pub(crate) fn started(mut self) -> Server {
        self.start();
        self
    }

    pub(crate) fn child_is_missing(&self) -> bool {
        self.child.is_none()
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// Ends it as a power cut of its process would.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Lets it stand still with its connections open.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a frozen one go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// Runs a future as a sink's thread does.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap().block_on(future)
}

/// The event `seq` of a journal, about 700 bytes long as events of frames are.
pub(crate) fn message(seq: u64) -> Message {
    sized(seq, 700)
}

/// The event `seq`, so many bytes long.
pub(crate) fn sized(seq: u64, bytes: usize) -> Message {
    let id = format!("4f2c9a71d0e3b586-{seq}");
    let stream = ["door", "yard", "gate"][seq as usize % 3];
    let start = format!(r#"{{"id":"{id}","seq":{seq},"stream":"{stream}","fill":""#);
    let fill = "x".repeat(bytes.saturating_sub(start.len() + 2));
    let topic = if seq % 10 == 7 { Topic::State } else { Topic::Frames };
    Message {
        seq,
        id,
        topic,
        stream: Some(stream.to_owned()),
        json: format!("{start}{fill}\"}}"),
        appended: std::time::SystemTime::now(),
    }
}

pub(crate) fn messages(range: std::ops::RangeInclusive<u64>) -> Vec<Message> {
    range.map(message).collect()
}

/// What one delivery came to.
#[derive(Debug, Default)]
pub(crate) struct Delivered {
    /// For each acknowledged message, whether it was a duplicate.
    pub(crate) acked: Vec<bool>,
    /// What went wrong in between.
    pub(crate) faults: Vec<Fault>,
}

impl Delivered {
    pub(crate) fn duplicates(&self) -> usize {
        self.acked.iter().filter(|it| **it).count()
    }
}

/// Delivers once.
pub(crate) async fn deliver(
    broker: &mut impl Broker,
    messages: &[Message],
) -> (Vec<bool>, Result<(), Fault>) {
    let mut acked = Vec::new();
    let mut told = |at: usize, duplicate: bool| {
        assert_eq!(at, acked.len(), "in order");
        acked.push(duplicate);
    };
    let result = broker.deliver(messages, &mut Acks::new(&mut told)).await;
    (acked, result)
}

/// Delivers as the sink's loop does, connecting anew after each failure, until all is
/// acknowledged. `told` gets how many are after each, `failed` each failure.
pub(crate) async fn deliver_all(
    broker: &mut impl Broker,
    messages: &[Message],
    mut told: impl FnMut(usize),
    mut failed: impl FnMut(&Fault),
) -> Delivered {
    let deadline = within(60_000);
    let mut done = Delivered::default();
    let mut connected = false;
    while done.acked.len() < messages.len() {
        assert!(std::time::Instant::now() < deadline, "not delivered: {:?}", done.faults);
        let result = if connected {
            let start = done.acked.len();
            let mut each = |at: usize, duplicate: bool| {
                assert_eq!(start + at, done.acked.len(), "in order");
                done.acked.push(duplicate);
                told(done.acked.len());
            };
            broker.deliver(&messages[start..], &mut Acks::new(&mut each)).await
        } else {
            broker.connect().await
        };
        connected = result.is_ok();
        if let Err(fault) = result {
            failed(&fault);
            done.faults.push(fault);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    done
}

/// The code of a failure that must have come.
pub(crate) fn code<T: std::fmt::Debug>(result: Result<T, Fault>) -> Code {
    result.expect_err("a fault").code
}
