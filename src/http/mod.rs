//! HTTP: `/metrics`, `/livez` and `/readyz`, read-only, on a thread and runtime of its own.
//!
//! It reads counters and flags only and waits for no stage, so that it answers when the data path
//! is stuck. HTTP/1 only; there is no cross-origin header, so that no web page can read it.

use std::{
    borrow::Cow,
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    pin::Pin,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    time,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::metrics::Metrics;

mod access;
mod connections;
pub(crate) mod query;
mod routes;
mod scrapes;

pub use access::{Access, Token};
pub use connections::{CONNECTIONS_KEPT, CONNECTIONS_MAX};

use connections::{Connection, Connections};
use scrapes::Scrapes;

/// Whoever does not send a request's header in this time, or sends nothing at all, is cut off.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request's body beyond which it is refused. No route reads a body.
pub const BODY_MAX: u64 = 64 << 10;
/// Bytes of a request's header beyond which it is refused.
const HEADER_MAX: usize = 16 << 10;
/// After this long a connection ends with its next answer. A reader that takes an answer too
/// slowly cannot hold a connection for longer than this and [`LINGER`].
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);
/// How long the last answer of a connection may take.
const LINGER: Duration = Duration::from_secs(10);
/// The same for a connection that makes room for another.
const PUSHED_OUT_LINGER: Duration = Duration::from_secs(1);
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// The pause after a failed accept: descriptors may be used up, and looking again at once would
/// only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How one condition of health is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// As it should be.
    Ok,
    /// Something is missing that the daemon can do without.
    Degraded,
    /// The daemon cannot do its work.
    Failed,
}

/// One condition of health.
#[derive(Clone, Debug)]
pub struct Check {
    /// Which.
    pub name: Cow<'static, str>,
    /// How it is.
    pub health: Health,
    /// In words, without secrets. May be empty.
    pub detail: String,
}

/// Looks at all conditions. Must not wait for a stage, or the server could not answer.
pub type Look = Box<dyn Fn() -> Vec<Check> + Send + Sync>;

/// What the server tells.
pub struct State {
    /// For `/metrics`, and where the server counts its own requests.
    pub metrics: Arc<Metrics>,
    /// For `/livez`: whether the stages' loops turn.
    pub live: Look,
    /// For `/readyz`: model loaded, self-test passed, journal writable; what cameras and brokers miss.
    pub ready: Look,
}

/// A running server. It ends when this is dropped.
pub struct Handle {
    addr: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Where it listens; the port is the real one even if 0 was asked for.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Whether the server's thread still runs. It ends by itself only by a bug.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|it| !it.is_finished())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the HTTP server has panicked");
        }
    }
}

/// Starts the server.
///
/// # Errors
/// The address is not of this machine only and there is no token, or it cannot be bound, or the
/// operating system refuses a thread.
pub fn serve(listen: SocketAddr, access: Access, state: Arc<State>) -> anyhow::Result<Handle> {
    ensure!(
        listen.ip().is_loopback() || access.has_token(),
        "http.listen {listen} can be reached from other machines: set http.token_file, or listen \
         on 127.0.0.1"
    );
    let listener = bind(listen)?;
    let addr = listener.local_addr().context("asking for the HTTP server's address")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("starting the HTTP server's runtime")?;
    let stop = CancellationToken::new();
    let server = Arc::new(Server {
        access: access.bound_to(addr.ip()),
        connections: Connections::new(state.metrics.clone()),
        scrapes: Scrapes::default(),
        state,
    });
    let stopped = stop.clone();
    let run = move || match runtime.block_on(accept(listener, server, stopped)) {
        Ok(()) => {}
        Err(error) => error!(%error, "the HTTP server has ended"),
    };
    let thread = thread::Builder::new().name("http".to_owned()).spawn(run);
    let thread = thread.context("starting the HTTP server's thread")?;
    Ok(Handle { addr, stop, thread: Some(thread) })
}

fn bind(listen: SocketAddr) -> anyhow::Result<StdListener> {
    let listener = match StdListener::bind(listen) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            bail!("http.listen {listen} is in use: choose another port, or stop who has it")
        }
        Err(error) => return Err(error).with_context(|| format!("binding http.listen {listen}")),
    };
    // The standard library asks for 128 places; a client that finds them all taken by a flood tries
    // again only after a second.
    rustix::net::listen(&listener, BACKLOG).context("preparing the HTTP server's socket")?;
    listener.set_nonblocking(true).context("preparing the HTTP server's socket")?;
    Ok(listener)
}

/// What all connections share.
pub(crate) struct Server {
    access: Access,
    connections: Connections,
    scrapes: Scrapes,
    state: Arc<State>,
}

async fn accept(
    listener: StdListener,
    server: Arc<Server>,
    stop: CancellationToken,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            it = listener.accept() => it,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "an HTTP connection could not be accepted");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match server.connections.enter() {
            Some(connection) => {
                tokio::spawn(connected(stream, connection, server.clone()));
            }
            None => refuse(&stream),
        }
        // Else a flood of new connections would keep those that are there from being read.
        tokio::task::yield_now().await;
    }
}

/// Serves one connection until it ends, is too old or has to make room.
async fn connected(stream: TcpStream, connection: Connection, server: Arc<Server>) {
    let service = service_fn(|request| {
        let answer = routes::answer(&server, &connection, &request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let linger = tokio::select! {
        biased;
        ended = &mut http => return say(ended),
        () = connection.is_pushed_out() => {
            if !connection.has_asked() {
                return refuse(&http.into_parts().io.into_inner());
            }
            PUSHED_OUT_LINGER
        }
        () = connection.is_last_answer() => LINGER,
        () = time::sleep(CONNECTION_AGE_MAX) => LINGER,
    };
    Pin::new(&mut http).graceful_shutdown();
    match time::timeout(linger, http).await {
        Ok(ended) => say(ended),
        Err(_) => debug!("an HTTP connection was cut off: its answer was read too slowly"),
    }
}

fn say(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        debug!(%error, "an HTTP connection has failed");
    }
}

/// Says that there is no room, if that can be said at once.
fn refuse(stream: &TcpStream) {
    let text =
        b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    if let Err(error) = stream.try_write(text) {
        debug!(%error, "a connection beyond the limit was closed without an answer");
    }
}
