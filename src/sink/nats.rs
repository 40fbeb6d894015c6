//! NATS JetStream: subject `<prefix>.<stream>.<topic>`, the event's id as `Nats-Msg-Id`.
//!
//! **Order.** Up to [`WINDOW`] messages are in flight. Each names its predecessor's id in
//! `Nats-Expected-Last-Msg-Id` unless that one is acknowledged, so the server stores a message
//! only right behind its predecessor, or when the predecessor is known to be stored. A message
//! that is refused (no room, a new leader that never saw it) so takes all later ones of its window
//! with it, and no retry comes after its successors. The same holds for what an old connection
//! left in the server's buffers and the server takes up after we have connected anew.
//!
//! Where several programs publish to one stream, one that comes in between breaks the chain, which
//! is no fault: the rest of the window is sent again, and the window is halved, down to one message
//! that names no predecessor, so that there is always progress.
//!
//! **Duplicates.** The server knows ids for its duplicate window (two minutes, where we make the
//! stream). Within it, a retry of a message that was stored is acknowledged as a duplicate and not
//! stored again. Beyond it (an outage that begins between storing and acknowledging, and lasts
//! longer) it is stored once more, with the same id, behind its successors.
//!
//! **What an acknowledgement is worth.** The message is written to the file of a quorum of the
//! stream's replicas, but a server syncs its files every two minutes by default (`sync_interval`):
//! a power cut of all of them can lose what they acknowledged since. `replay` sends it again.
//!
//! The client would connect anew by itself and send what it still has. That is the loop's
//! business, so its second authentication fails, which ends it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::anyhow;
use async_nats::{
    Auth, AuthError, ConnectErrorKind, ConnectOptions, Event, ServerAddr, ServerError,
    jetstream::{
        ErrorCode,
        context::{
            Context, ContextBuilder, CreateStreamErrorKind, GetStreamErrorKind, PublishAckFuture,
            PublishError, PublishErrorKind, RequestError, RequestErrorKind,
        },
        message::PublishMessage,
        publish::PublishAck,
        stream::{Config, DiscardPolicy, StorageType},
    },
};
use tokio::{sync::watch, time::timeout};

use crate::sink::{
    broker::{Acks, Broker, Code, Fault, Message, Topic},
    settings::{Login, Nats as Settings, Unusable},
    tls,
};

/// What is logged of the library: at `info` it tells each connection, which a sink tells itself.
pub const LOG: &str = "async_nats=warn";

/// Messages in flight.
const WINDOW: usize = 256;
/// How often an idle connection is tried; it is lost when two tries go unanswered.
const PING: Duration = Duration::from_secs(10);

/// A connection to one NATS server.
#[derive(Debug)]
pub struct Nats {
    settings: Settings,
    connection: Option<Connection>,
    /// How many messages may be in flight at present.
    window: usize,
}

#[derive(Debug)]
struct Connection {
    jetstream: Context,
    /// Becomes true when the connection is lost.
    lost: watch::Receiver<bool>,
    /// The last refusal that the server sent on its own.
    refusal: Arc<Mutex<Option<String>>>,
    place: String,
}

/// Checks what a server would refuse only when the first event comes.
///
/// # Errors
/// What is wrong with which setting.
pub fn check(settings: &Settings) -> Result<(), Unusable> {
    for server in &settings.servers {
        // The client would also take an address without a scheme, or one that names no host.
        let host = server.parse::<ServerAddr>().map(|it| it.host().to_owned());
        let why = match host {
            Ok(it) if !it.is_empty() => continue,
            Ok(_) => "it names no host".to_owned(),
            Err(error) => error.to_string(),
        };
        return Err(Unusable::new("servers", format!("{server:?} is no address: {why}")));
    }
    let Settings { subject_prefix: prefix, stream, .. } = settings;
    let bad =
        |it: &str| it.is_empty() || it.contains(|it: char| it.is_control() || " *>".contains(it));
    if prefix.split('.').any(bad) {
        let why =
            format!("{prefix:?} has an empty part, a space, `*` or `>`, which no subject can have");
        return Err(Unusable::new("prefix", why));
    }
    let odd = |it: char| it.is_control() || it.is_whitespace() || ".*>/\\".contains(it);
    if stream.is_empty() || stream.contains(odd) {
        let why = format!("{stream:?} has a space, `.`, `*`, `>`, `/` or `\\`, or is empty");
        return Err(Unusable::new("stream", why));
    }
    Ok(())
}

impl Nats {
    /// Connects nowhere yet.
    pub fn new(settings: Settings) -> Nats {
        Nats { settings, connection: None, window: WINDOW }
    }

    fn subject(&self, message: &Message) -> String {
        let prefix = &self.settings.subject_prefix;
        format!("{prefix}.{}.{}", message.stream_or_none(), message.topic.name())
    }

    async fn open(&self, server: &str) -> Result<Connection, Fault> {
        let bad =
            |error| Fault::new(Code::Error, anyhow!("{server} is no server of NATS: {error}"));
        let address: ServerAddr = server.parse().map_err(bad)?;
        let place = format!("nats {}:{}", address.host(), address.port());
        let (tell, lost) = watch::channel(false);
        let refusal = Arc::<Mutex<Option<String>>>::default();
        let options = self.options(tell, refusal.clone())?;
        let client = options.connect(address).await.map_err(|error| {
            let code = match error.kind() {
                ConnectErrorKind::Dns => Code::Dns,
                ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                    Code::Auth
                }
                ConnectErrorKind::TimedOut => Code::Timeout,
                ConnectErrorKind::Tls => Code::Tls,
                _ => tls::code(&error),
            };
            Fault::new(code, anyhow!("{place}: {error}"))
        })?;
        let jetstream = ContextBuilder::new().timeout(self.settings.timeout).build(client);
        Ok(Connection { jetstream, lost, refusal, place })
    }

    fn options(
        &self,
        tell: watch::Sender<bool>,
        refusal: Arc<Mutex<Option<String>>>,
    ) -> Result<ConnectOptions, Fault> {
        let Login { username, password, token } = &self.settings.login;
        let mut auth = Auth::new();
        auth.username = username.clone();
        auth.password = password.as_ref().map(|it| it.expose().to_owned());
        auth.token = token.as_ref().map(|it| it.expose().to_owned());
        let used = AtomicBool::new(false);
        let once = move |_| {
            let first = !used.swap(true, Ordering::Relaxed);
            let auth = first.then(|| auth.clone());
            async { auth.ok_or_else(|| AuthError::new("the sink connects anew itself")) }
        };
        let mut options = ConnectOptions::with_auth_callback(once)
            .name("ghostwatch")
            .max_reconnects(1)
            .reconnect_delay_callback(|_| Duration::ZERO)
            .ignore_discovered_servers()
            .connection_timeout(self.settings.timeout)
            .ping_interval(PING)
            .event_callback(move |event| {
                match event {
                    Event::Disconnected | Event::Closed => drop(tell.send(true)),
                    Event::ServerError(ServerError::Other(it)) => {
                        *refusal.lock().expect("no holder panics") = Some(it);
                    }
                    _ => (),
                }
                async {}
            });
        if let Some(tls) = &self.settings.tls {
            options = options.require_tls(true).tls_client_config(tls::client_config(tls)?);
        }
        Ok(options)
    }

    /// Makes the stream, if it is not there.
    async fn prepare(&self, connection: &Connection) -> Result<(), Fault> {
        let Settings { stream, subject_prefix, create, .. } = &self.settings;
        let place = &connection.place;
        let found = match connection.jetstream.get_stream(stream).await {
            Ok(it) => it.cached_info().config.clone(),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(it)
                    if it.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    let config = Config {
                        name: stream.clone(),
                        description: Some("events of ghostwatch".to_owned()),
                        subjects: vec![format!("{subject_prefix}.>")],
                        storage: StorageType::File,
                        discard: DiscardPolicy::Old,
                        max_age: create.max_age.unwrap_or_default(),
                        max_bytes: create.max_bytes.map_or(-1, |it| it as i64),
                        num_replicas: create.replicas,
                        duplicate_window: create.duplicate_window,
                        ..Config::default()
                    };
                    let made = connection.jetstream.create_stream(config).await;
                    let made = made.map_err(|error| {
                        let code = match error.kind() {
                            CreateStreamErrorKind::JetStream(it) => api_code(it.error_code()),
                            CreateStreamErrorKind::TimedOut => Code::Timeout,
                            CreateStreamErrorKind::JetStreamUnavailable => Code::NotFound,
                            _ => Code::Error,
                        };
                        let what = anyhow!("{place}: making the stream {stream}: {error}");
                        connection.explain(Fault::new(code, what))
                    })?;
                    made.cached_info().config.clone()
                }
                GetStreamErrorKind::JetStream(it) => {
                    let what = anyhow!("{place}: looking for the stream {stream}: {it}");
                    return Err(Fault::new(api_code(it.error_code()), what));
                }
                _ => {
                    let said = error.to_string();
                    let cause = std::error::Error::source(&error);
                    let cause = cause.and_then(|it| it.downcast_ref::<RequestError>());
                    let code = match cause.map(RequestError::kind) {
                        Some(RequestErrorKind::NoResponders) => Code::NotFound,
                        _ => Code::Timeout,
                    };
                    let what = anyhow!(
                        "{place}: looking for the stream {stream}: {said}; is JetStream on?"
                    );
                    return Err(connection.explain(Fault::new(code, what)));
                }
            },
        };
        for topic in Topic::ALL {
            let ours = format!("{subject_prefix}.*.{}", topic.name());
            if !found.subjects.iter().any(|it| covers(it, &ours)) {
                let what = anyhow!(
                    "{place}: the stream {stream} takes {}, not {ours}; add `{subject_prefix}.>` \
                     to its subjects, or name another stream",
                    found.subjects.join(", ")
                );
                return Err(Fault::new(Code::NotFound, what));
            }
        }
        Ok(())
    }

    fn connection(&mut self) -> Result<&mut Connection, Fault> {
        self.connection.as_mut().ok_or_else(|| Fault::new(Code::Error, anyhow!("not connected")))
    }

    async fn send(
        &mut self,
        message: &Message,
        previous: Option<&Message>,
    ) -> Result<PublishAckFuture, Fault> {
        let subject = self.subject(message);
        let mut publish = PublishMessage::build()
            .message_id(&message.id)
            .expected_stream(&self.settings.stream)
            .payload(message.json.clone().into());
        if let Some(previous) = previous {
            publish = publish.expected_last_message_id(&previous.id);
        }
        let connection = self.connection()?;
        let sent = connection.jetstream.send_publish(subject, publish).await;
        sent.map_err(|error| connection.fault(error, message))
    }

    /// Waits for what is in flight. What comes of it does not matter: it is sent again.
    async fn drain(&mut self, flying: VecDeque<PublishAckFuture>) -> Result<(), Fault> {
        let connection = self.connection()?;
        for it in flying {
            match connection.ack(it).await? {
                Err(error) if error.kind() == PublishErrorKind::TimedOut => {
                    return Err(Fault::new(
                        Code::Timeout,
                        anyhow!("{}: {error}", connection.place),
                    ));
                }
                _ => (),
            }
        }
        Ok(())
    }
}

impl Connection {
    /// The answer to a message, unless the connection is lost first.
    async fn ack(
        &mut self,
        sent: PublishAckFuture,
    ) -> Result<Result<PublishAck, PublishError>, Fault> {
        tokio::select! {
            biased;
            ack = sent.into_future() => Ok(ack),
            fault = self.lost() => Err(fault),
        }
    }

    async fn lost(&mut self) -> Fault {
        // An error means that the client is gone, and so the connection.
        drop(self.lost.wait_for(|it| *it).await);
        self.explain(Fault::new(Code::Error, anyhow!("{}: the connection was lost", self.place)))
    }

    /// A refusal that came beside a failure is its reason.
    fn explain(&self, fault: Fault) -> Fault {
        match self.refusal.lock().expect("no holder panics").take() {
            Some(it) if it.to_lowercase().contains("permissions violation") => {
                Fault::new(Code::Auth, fault.error.context(it))
            }
            Some(it) => Fault::new(fault.code, fault.error.context(it)),
            None => fault,
        }
    }

    fn fault(&self, error: PublishError, message: &Message) -> Fault {
        let code = match error.kind() {
            PublishErrorKind::StreamNotFound => Code::NotFound,
            PublishErrorKind::TimedOut => Code::Timeout,
            PublishErrorKind::MaxPayloadExceeded => Code::TooLarge,
            _ => std::error::Error::source(&error)
                .and_then(|it| of_type(GetStreamErrorKind::JetStream, it))
                .map_or(Code::Error, |it| api_code(it.error_code())),
        };
        let what = anyhow!("{}: event {}: {error}", self.place, message.id);
        self.explain(Fault::new(code, what))
    }
}

impl Broker for Nats {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.connection = None;
        let mut last = Fault::new(Code::Error, anyhow!("no server of NATS is named"));
        for server in &self.settings.servers {
            // Every step has its own time limit, but a server could be slow in each.
            let opened = timeout(self.settings.timeout * 2, async {
                let connection = self.open(server).await?;
                self.prepare(&connection).await?;
                Ok(connection)
            });
            match opened.await {
                Ok(Ok(connection)) => {
                    self.connection = Some(connection);
                    self.window = WINDOW;
                    return Ok(());
                }
                Ok(Err(fault)) => last = fault,
                Err(_) => {
                    let what = anyhow!("{server}: no connection within the time");
                    last = Fault::new(Code::Timeout, what);
                }
            }
        }
        Err(last)
    }

    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        let mut flying = VecDeque::new();
        let mut sent = 0;
        // Acknowledgements since the window was changed.
        let mut good = 0;
        while acks.count() < messages.len() {
            let mut refused = None;
            while sent < messages.len() && flying.len() < self.window {
                let previous = (!flying.is_empty()).then(|| &messages[sent - 1]);
                match self.send(&messages[sent], previous).await {
                    Ok(it) => flying.push_back(it),
                    Err(fault) => {
                        refused = Some(fault);
                        break;
                    }
                }
                sent += 1;
            }
            let Some(next) = flying.pop_front() else {
                return Err(refused.expect("a message was refused, or one is in flight"));
            };
            match self.connection()?.ack(next).await? {
                Ok(ack) => {
                    acks.next(ack.duplicate);
                    good += 1;
                    if good >= self.window {
                        self.window = (self.window * 2).min(WINDOW);
                        good = 0;
                    }
                }
                Err(error) => {
                    let flown = std::mem::take(&mut flying);
                    if error.kind() == PublishErrorKind::WrongLastMessageId {
                        self.drain(flown).await?;
                        self.window = (self.window / 2).max(1);
                        (sent, good) = (acks.count(), 0);
                        continue;
                    }
                    let fault = self.connection()?.fault(error, &messages[acks.count()]);
                    if fault.code == Code::TooLarge {
                        self.drain(flown).await?;
                    }
                    return Err(fault);
                }
            }
        }
        Ok(())
    }

    async fn lost(&mut self) -> Fault {
        match &mut self.connection {
            Some(connection) => connection.lost().await,
            None => Fault::new(Code::Error, anyhow!("not connected")),
        }
    }

    async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Nothing is in flight, so a failure loses nothing.
            drop(timeout(Duration::from_secs(1), connection.jetstream.client().flush()).await);
        }
    }
}

/// `error`, if it is what `variant` holds: the crate does not let its name be said.
fn of_type<'a, T: std::error::Error + 'static>(
    _variant: fn(T) -> GetStreamErrorKind,
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a T> {
    error.downcast_ref()
}

/// The code of what JetStream says.
fn api_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM | ErrorCode::STREAM_HEADER_EXCEEDS_MAXIMUM => {
            Code::TooLarge
        }
        ErrorCode::STREAM_NOT_FOUND
        | ErrorCode::STREAM_NOT_MATCH
        | ErrorCode::STREAM_SUBJECT_OVERLAP
        | ErrorCode::JETSTREAM_NOT_ENABLED
        | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => Code::NotFound,
        ErrorCode::STREAM_STORE_FAILED
        | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
        | ErrorCode::INSUFFICIENT_RESOURCES
        | ErrorCode::STORAGE_RESOURCES_EXCEEDED
        | ErrorCode::MEMORY_RESOURCES_EXCEEDED => Code::Full,
        _ => Code::Error,
    }
}

/// Whether every subject of `ours` is one of `pattern`.
fn covers(pattern: &str, ours: &str) -> bool {
    let mut ours = ours.split('.');
    for part in pattern.split('.') {
        match (part, ours.next()) {
            (">", Some(_)) => return true,
            ("*", Some(it)) if it != ">" => (),
            (part, Some(it)) if part == it => (),
            _ => return false,
        }
    }
    ours.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streams_subjects_must_cover_all_of_ours() {
        let ours = "ghostwatch.v1.*.frames";
        for yes in [">", "ghostwatch.>", "ghostwatch.v1.>", "ghostwatch.v1.*.frames", "*.*.*.*"] {
            assert!(covers(yes, ours), "{yes}");
        }
        for no in ["ghostwatch", "ghostwatch.v1.door.frames", "ghostwatch.v1.*", "other.>", "*.*"] {
            assert!(!covers(no, ours), "{no}");
        }
        assert!(!covers("ghostwatch.v1.*.frames.>", ours));
    }
}
