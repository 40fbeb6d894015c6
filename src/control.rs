//! The unix socket on which an operator tells the running daemon what to do, and its other end.
//!
//! `POST /api/v1/streams/<id>/<restart|enable|disable>` in HTTP/1.1, so that `curl --unix-socket` does
//! it too. Only root and the user that the daemon runs as are heard. The daemon's own loop carries the
//! order out and answers; this file only brings the two together.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client, server,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream, unix::UCred},
    runtime::Runtime,
    sync::oneshot,
    time,
};
use tokio_util::sync::CancellationToken;

use crate::journal::side;

/// The longest path that a unix socket can have: 108 bytes with the zero at its end.
const PATH_MAX: usize = 107;
/// Orders that wait for the daemon's loop.
const ORDERS_MAX: usize = 16;
/// How long a client may take for its request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// The daemon's loop looks for orders ten times a second.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Where a daemon with this journal listens if nothing else is said: in the folder that systemd makes
/// for it, else beside the journal, which no other daemon can have.
pub fn path_of(journal: &Path) -> PathBuf {
    path_in(runtime_folder().as_deref(), journal)
}

/// The folder that systemd makes for the daemon.
fn runtime_folder() -> Option<PathBuf> {
    std::env::var_os("RUNTIME_DIRECTORY").filter(|it| !it.is_empty()).map(PathBuf::from)
}

fn path_in(folder: Option<&Path>, journal: &Path) -> PathBuf {
    folder.map_or_else(|| side::path_of(journal, side::SOCKET), |it| it.join(NAME))
}

/// Where to look for a daemon with this journal, one after the other: a socket that is there may be
/// left over from a daemon that was killed.
pub fn places(journal: &Path) -> Vec<PathBuf> {
    places_in(runtime_folder().as_deref(), journal)
}

fn places_in(folder: Option<&Path>, journal: &Path) -> Vec<PathBuf> {
    let (first, beside) = (path_in(folder, journal), side::path_of(journal, side::SOCKET));
    let mut places = vec![first, beside, Path::new("/run/ghostwatch").join(NAME)];
    places.dedup();
    places
}

/// The socket's name in a folder of its own.
const NAME: &str = "api.sock";

/// The header in which a request can say which journal the daemon is to have: see [`mark`].
const JOURNAL: &str = "ghostwatch-journal";

/// What a journal is known by, whatever its path looks like from where one stands: `None` if there is
/// none.
fn mark(journal: &Path) -> Option<String> {
    let it = fs::metadata(journal).ok()?;
    Some(format!("{}:{}", it.dev(), it.ino()))
}

/// What can be done to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Close it and open it again, at once.
    Restart,
    /// Open it again after it was disabled or quarantined.
    Enable,
    /// Close it, and leave it closed, also after a restart of the daemon.
    Disable,
}

impl Action {
    /// Every action.
    pub const ALL: [Action; 3] = [Action::Restart, Action::Enable, Action::Disable];

    /// Its name in paths and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Action::Restart => "restart",
            Action::Enable => "enable",
            Action::Disable => "disable",
        }
    }
}

/// What came of an order, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done, or it was so before.
    Done(String),
    /// There is no such stream.
    Unknown(String),
    /// It cannot be done as things are.
    Refused(String),
}

/// An order on its way to the daemon's loop.
#[derive(Debug)]
pub struct Order {
    /// What to do.
    pub action: Action,
    /// To which stream.
    pub stream: String,
    answer: oneshot::Sender<Answer>,
}

impl Order {
    /// Whether whoever has given it waits no more, and was told that nothing came of it.
    pub fn is_given_up(&self) -> bool {
        self.answer.is_closed()
    }

    /// Answers whoever has given it.
    pub fn answer(self, answer: Answer) {
        // Whoever asked may have gone; it is done all the same.
        drop(self.answer.send(answer));
    }
}

/// The listening end. The socket goes when this is dropped.
pub struct Control {
    path: PathBuf,
    orders: mpsc::Receiver<Order>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Listens at `path` for orders to the daemon with this journal. A socket that is there and that nobody
    /// listens at is taken to be left over from a daemon that was killed.
    ///
    /// # Errors
    /// The path is too long, something else or somebody is there, or the socket cannot be made.
    pub fn listen(path: &Path, journal: &Path) -> anyhow::Result<Control> {
        let shown = path.display();
        if PATH_MAX < path.as_os_str().len() {
            bail!("{shown} is longer than the {PATH_MAX} bytes of a unix socket's path");
        }
        clear(path)?;
        let runtime = runtime()?;
        let guard = runtime.enter();
        let listener = UnixListener::bind(path).with_context(|| format!("binding {shown}"))?;
        drop(guard);
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("closing {shown} to others"))?;
        let (orders_tx, orders) = mpsc::sync_channel(ORDERS_MAX);
        let desk = Desk { orders: orders_tx, journal: journal.to_owned() };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = stopped.cancelled() => {}
                    () = accept(listener, desk) => {}
                }
            });
        };
        let thread = thread::Builder::new().name("control".to_owned()).spawn(run)?;
        Ok(Control { path: path.to_owned(), orders, stop, thread: Some(thread) })
    }

    /// The next order, if there is one.
    pub fn next(&self) -> Option<Order> {
        self.orders.try_recv().ok()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.cancel();
        if self.thread.take().is_some_and(|it| it.join().is_err()) {
            tracing::error!("the control socket's thread has panicked");
        }
        // Somebody may have removed it.
        fs::remove_file(&self.path).ok();
    }
}

/// Takes away what a daemon that was killed has left.
fn clear(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("looking at {shown}")),
        Ok(it) if it.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                bail!("somebody listens at {shown} already");
            }
            fs::remove_file(path).with_context(|| format!("removing {shown}"))
        }
        Ok(_) => bail!("{shown} is there and is no socket"),
    }
}

fn runtime() -> anyhow::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_io().enable_time().build().context("starting the control socket's runtime")
}

/// Where orders are taken.
#[derive(Clone)]
struct Desk {
    orders: mpsc::SyncSender<Order>,
    /// The daemon's.
    journal: PathBuf,
}

impl Desk {
    /// Why a request is for another daemon, if it is.
    fn misdirected(&self, request: &Request<Incoming>) -> Option<String> {
        let meant = request.headers().get(JOURNAL)?;
        let is_mine = mark(&self.journal).is_some_and(|it| it.as_bytes() == meant.as_bytes());
        let shown = std::path::absolute(&self.journal).unwrap_or(self.journal.clone());
        (!is_mine).then(|| {
            let shown = shown.display();
            format!(
                "the daemon that listens here writes to another journal, {shown}: nothing is \
                 changed; name its configuration with --config"
            )
        })
    }
}

async fn accept(listener: UnixListener, desk: Desk) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection to the control socket could not be accepted");
                time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Root can connect whatever the file's mode says; nobody else should have come so far.
        match stream.peer_cred() {
            Ok(it) if may_order(&it) => {}
            other => {
                tracing::warn!(peer = ?other.ok(), "an order by somebody else was refused");
                continue;
            }
        }
        tokio::spawn(serve(stream, desk.clone()));
    }
}

fn may_order(peer: &UCred) -> bool {
    peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw()
}

async fn serve(stream: UnixStream, desk: Desk) {
    let service = service_fn(|request: Request<Incoming>| {
        let desk = desk.clone();
        async move {
            let (status, text) = match desk.misdirected(&request) {
                Some(text) => (StatusCode::MISDIRECTED_REQUEST, text),
                None => answer(request.method(), request.uri().path(), &desk.orders).await,
            };
            let mut response = Response::new(Full::new(Bytes::from(text + "\n")));
            *response.status_mut() = status;
            Ok::<_, Infallible>(response)
        }
    });
    let served = server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection to the control socket has failed");
    }
}

async fn answer(
    method: &Method,
    path: &str,
    orders: &mpsc::SyncSender<Order>,
) -> (StatusCode, String) {
    let Some((stream, action)) = route(path) else {
        let actions = Action::ALL.map(Action::name).join("|");
        let text = format!("there is only POST /api/v1/streams/<id>/<{actions}>");
        return (StatusCode::NOT_FOUND, text);
    };
    if method != Method::POST {
        return (StatusCode::METHOD_NOT_ALLOWED, "this takes POST only".to_owned());
    }
    let (answer, answered) = oneshot::channel();
    let order = Order { action, stream: stream.to_owned(), answer };
    let busy = || (StatusCode::SERVICE_UNAVAILABLE, "the daemon does not answer".to_owned());
    if orders.try_send(order).is_err() {
        return busy();
    }
    match time::timeout(ANSWER_MAX, answered).await {
        Ok(Ok(Answer::Done(text))) => (StatusCode::OK, text),
        Ok(Ok(Answer::Unknown(text))) => (StatusCode::NOT_FOUND, text),
        Ok(Ok(Answer::Refused(text))) => (StatusCode::CONFLICT, text),
        Ok(Err(_)) => (StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping".to_owned()),
        Err(_) => busy(),
    }
}

fn route(path: &str) -> Option<(&str, Action)> {
    let (stream, action) = path.strip_prefix("/api/v1/streams/")?.split_once('/')?;
    Some((stream, Action::ALL.into_iter().find(|it| it.name() == action)?))
}

/// Gives an order to the daemon with this journal, which listens at one of `places`, and waits for its
/// answer. Without a journal the first daemon is meant. One that is not there is not insisted on: a
/// daemon under systemd has its own by default.
///
/// # Errors
/// Nobody listens there, or it does not answer.
pub fn order(
    places: &[PathBuf],
    journal: Option<&Path>,
    action: Action,
    stream: &str,
) -> anyhow::Result<Answer> {
    runtime()?.block_on(async {
        let ask = ask_one(places, journal, action, stream);
        time::timeout(2 * ANSWER_MAX, ask).await.context("the daemon does not answer")?
    })
}

async fn ask_one(
    places: &[PathBuf],
    journal: Option<&Path>,
    action: Action,
    stream: &str,
) -> anyhow::Result<Answer> {
    let (mut other, mut failed) = (None, None);
    for path in places {
        let shown = path.display();
        let connected = match UnixStream::connect(path).await {
            Ok(connected) => connected,
            Err(error) => {
                // The daemon may listen at the next place all the same.
                failed = failed.or(unreachable(path, &error));
                continue;
            }
        };
        match ask(connected, journal.and_then(mark), action, stream).await? {
            (StatusCode::OK, text) => return Ok(Answer::Done(text)),
            (StatusCode::NOT_FOUND, text) => return Ok(Answer::Unknown(text)),
            (StatusCode::CONFLICT, text) => return Ok(Answer::Refused(text)),
            (StatusCode::MISDIRECTED_REQUEST, text) => other = Some(format!("{shown}: {text}")),
            (status, text) => bail!("{text} ({status})"),
        }
    }
    if let Some(other) = other {
        return Ok(Answer::Refused(other));
    }
    let shown: Vec<_> = places.iter().map(|it| it.display().to_string()).collect();
    let shown = shown.join(" or ");
    let nobody = || format!("no daemon listens at {shown}; is it running with this journal?");
    bail!(failed.unwrap_or_else(nobody))
}

/// Why it is not known whether a daemon listens at a place. `None` iff none does.
fn unreachable(path: &Path, error: &io::Error) -> Option<String> {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => None,
        io::ErrorKind::PermissionDenied => {
            Some(format!("{shown}: only root and the user that the daemon runs as may give orders"))
        }
        _ if PATH_MAX < path.as_os_str().len() => {
            Some(format!("{shown} is longer than the {PATH_MAX} bytes of a unix socket's path"))
        }
        _ => Some(format!("{shown}: {error}")),
    }
}

async fn ask(
    connected: UnixStream,
    journal: Option<String>,
    action: Action,
    stream: &str,
) -> anyhow::Result<(StatusCode, String)> {
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(connected)).await?;
    let mut request = Request::post(format!("/api/v1/streams/{stream}/{}", action.name()))
        .header("host", "localhost")
        .header("connection", "close");
    if let Some(journal) = journal {
        request = request.header(JOURNAL, journal);
    }
    let request = request.body(Empty::<Bytes>::new())?;
    let connection = tokio::spawn(connection);
    let response =
        sender.send_request(request).await.context("the daemon closed the connection")?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    drop(sender);
    connection.await.context("the connection's task")??;
    Ok((status, String::from_utf8_lossy(&body).trim_end().to_owned()))
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
