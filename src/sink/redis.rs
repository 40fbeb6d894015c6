//! Redis Streams: one key per journal and topic, entries numbered as the journal numbers them.
//!
//! **Order.** A window of messages is one transaction (`MULTI` … `EXEC`), and there is one at a
//! time. What Redis refuses for want of memory, disk or rights it refuses when a command is
//! queued, and then it does none of them. So no message is stored before an earlier one of its
//! key. In a plain pipeline a message could be refused and the next one stored, because memory
//! became free between them; and the refused one could never be added again, for Redis takes only
//! growing ids.
//!
//! **Duplicates.** An entry's id is `<sequence>-0`. A retry of what was stored is refused, as its
//! id is not above the key's last one; the entry is then looked up, and its event id compared. An
//! entry that is gone (trimmed by `MAXLEN`, or deleted by a consumer) counts as stored if the
//! key's last id can be ours. If it cannot, somebody else writes to the key, which is a fault.
//!
//! **What an acknowledgement is worth.** As much as the server's `appendfsync`: with `always` it
//! survives a power cut, with the default `everysec` the last second may be lost, and without an
//! append-only file all since the last snapshot. What a server lost cannot be added again below
//! the ids that came after.

use anyhow::anyhow;
use redis::{
    AsyncConnectionConfig, Pipeline, RedisConnectionInfo, RedisError, RedisResult, Value,
    aio::MultiplexedConnection,
    streams::{StreamInfoStreamReply, StreamRangeReply},
};
use tokio::{task::JoinHandle, time::timeout};

use crate::sink::{
    broker::{Acks, Broker, Code, Fault, Message},
    settings::Redis as Settings,
    tls,
};

/// Messages of one transaction. A server does nothing else meanwhile: about a millisecond.
const WINDOW: usize = 256;
/// Bytes of one transaction, below the server's smallest limit for a query (1 MiB); a single
/// message may have more.
const WINDOW_BYTES: usize = 512 * 1024;
/// The smallest that a server's limit of one argument can be.
const ARGUMENT_BYTES: usize = 1024 * 1024;
/// An id from here on is a time in milliseconds, which Redis gives where nobody names an id.
const TIMES_FROM: u64 = 1_000_000_000_000;

/// A connection to one Redis server.
#[derive(Debug)]
pub struct Redis {
    settings: Settings,
    connection: Option<(MultiplexedConnection, JoinHandle<()>)>,
}

impl Redis {
    /// Connects nowhere yet.
    pub fn new(settings: Settings) -> Redis {
        Redis { settings, connection: None }
    }

    fn key(&self, message: &Message) -> String {
        format!("{}:{}:{}", self.settings.key_prefix, message.journal(), message.topic.name())
    }

    fn place(&self) -> String {
        format!("redis {}:{}", self.settings.host, self.settings.port)
    }

    fn timed_out(&self) -> Fault {
        let secs = self.settings.timeout.as_secs_f32();
        Fault::new(Code::Timeout, anyhow!("{}: no answer within {secs} s", self.place()))
    }

    fn fault(&self, error: &RedisError) -> Fault {
        // A transaction that was given up says so; why, each command says.
        let server = error.clone().into_server_errors();
        let first = server.as_ref().and_then(|it| it.first());
        let code = match first {
            Some((_, it)) => server_code(it.code(), it.details().unwrap_or("")),
            None if error.is_timeout() => Code::Timeout,
            None if error.kind() == redis::ErrorKind::AuthenticationFailed => Code::Auth,
            None => match error.code() {
                Some(code) => server_code(code, error.detail().unwrap_or("")),
                // The client hides the cause of an error of the connection behind its text.
                None if error.to_string().contains("received fatal alert") => Code::Tls,
                None => tls::code(error),
            },
        };
        let said = match first {
            Some((_, it)) => format!("{} {}", it.code(), it.details().unwrap_or("")),
            None => error.to_string(),
        };
        let advice = match code {
            Code::Full => "; give it room, or set `max_entries`",
            Code::Auth => "; the user needs PING, XADD, XRANGE, XINFO, MULTI and EXEC on the keys",
            _ => "",
        };
        Fault::new(code, anyhow!("{}: {}{advice}", self.place(), said.trim()))
    }

    async fn query<T: redis::FromRedisValue>(&mut self, pipe: &Pipeline) -> Result<T, Fault> {
        let Some((connection, _)) = &mut self.connection else {
            return Err(Fault::new(Code::Error, anyhow!("not connected")));
        };
        match timeout(self.settings.timeout, pipe.query_async(connection)).await {
            Ok(Ok(it)) => Ok(it),
            Ok(Err(error)) => Err(self.fault(&error)),
            Err(_) => Err(self.timed_out()),
        }
    }

    /// Adds a window of messages, all or none, and tells of those that are there.
    async fn window(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        let mut pipe = redis::pipe();
        pipe.atomic().ignore_errors();
        for it in messages {
            pipe.cmd("XADD").arg(self.key(it));
            if let Some(max) = self.settings.max_entries {
                pipe.arg("MAXLEN").arg("~").arg(max);
            }
            pipe.arg(entry_id(it)).arg("id").arg(&it.id).arg("event").arg(&it.json);
        }
        let added: Vec<RedisResult<Value>> = self.query(&pipe).await?;
        if added.len() != messages.len() {
            let (got, of) = (added.len(), messages.len());
            let what = anyhow!("{}: {got} answers to {of} commands", self.place());
            return Err(Fault::new(Code::Error, what));
        }
        for (message, added) in messages.iter().zip(added) {
            match added {
                Ok(_) => acks.next(false),
                Err(error) if is_id_refused(&error) => {
                    self.check_stored(message).await?;
                    acks.next(true);
                }
                Err(error) => return Err(self.fault(&error)),
            }
        }
        Ok(())
    }

    /// Whether a message, whose id was refused as too small, was stored before.
    async fn check_stored(&mut self, message: &Message) -> Result<(), Fault> {
        let (key, id) = (self.key(message), entry_id(message));
        let mut pipe = redis::pipe();
        pipe.cmd("XRANGE").arg(&key).arg(&id).arg(&id).cmd("XINFO").arg("STREAM").arg(&key);
        let (found, info): (StreamRangeReply, StreamInfoStreamReply) = self.query(&pipe).await?;
        let foreign = |what: String| {
            let what = anyhow!("{}: {what}; another program writes to this key", self.place());
            Err(Fault::new(Code::Error, what))
        };
        if let Some(entry) = found.ids.first() {
            let stored: Option<String> = entry.get("id");
            return match stored {
                Some(it) if it == message.id => Ok(()),
                _ => foreign(format!("{key} holds {id}, which is not event {}", message.id)),
            };
        }
        let last = info.last_generated_id;
        let can_be_ours = last.strip_suffix("-0").and_then(|it| it.parse::<u64>().ok());
        if can_be_ours.is_some_and(|it| it < TIMES_FROM) {
            return Ok(());
        }
        foreign(format!("{key} ends at {last}, so {id} cannot be added"))
    }

    /// The messages that go into the next transaction.
    fn fitting(messages: &[Message]) -> usize {
        let mut bytes = 0;
        let fits = |it: &&Message| {
            bytes += it.json.len();
            bytes <= WINDOW_BYTES
        };
        messages.iter().take(WINDOW).take_while(fits).count().max(1)
    }

    async fn open(&mut self) -> Result<(), Fault> {
        let Settings { host, port, login, .. } = &self.settings;
        let stream = tls::connect(host, *port, self.settings.tls.as_ref()).await?;
        let mut info = RedisConnectionInfo::default().set_db(self.settings.database.into());
        if let Some(name) = &login.username {
            info = info.set_username(name);
        }
        if let Some(password) = &login.password {
            info = info.set_password(password.expose());
        }
        // Its own time limit would be half a second; ours are around the calls.
        let config =
            AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        let made = MultiplexedConnection::new_with_config(&info, stream, config).await;
        let (connection, driver) = made.map_err(|error| self.fault(&error))?;
        self.connection = Some((connection, tokio::spawn(driver)));
        // A server that wants a password greets whoever gives none.
        self.query::<()>(redis::pipe().cmd("PING").ignore()).await
    }

    fn forget(&mut self) {
        if let Some((_, driver)) = self.connection.take() {
            driver.abort();
        }
    }

    /// Finds the message that the server closes the connection for, one by one: it does not say
    /// which of a window it was, and often says nothing, as it closes before it was all sent. One
    /// that breaks two connections, to a server that answers in between, is too large.
    async fn one_by_one(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        self.connect().await?;
        for message in messages {
            let one = std::slice::from_ref(message);
            let Err(first) = self.window(one, acks).await else { continue };
            if !is_size(&first, one) {
                return Err(first);
            }
            self.connect().await?;
            let Err(again) = self.window(one, acks).await else { continue };
            if !is_size(&again, one) {
                return Err(again);
            }
            self.connect().await?;
            let bytes = message.json.len();
            let what = again.error.context(format!("event {} of {bytes} bytes", message.id));
            return Err(Fault::new(Code::TooLarge, what));
        }
        Ok(())
    }
}

impl Broker for Redis {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.forget();
        let opened = timeout(self.settings.timeout, self.open()).await;
        let opened = opened.unwrap_or_else(|_| Err(self.timed_out()));
        if opened.is_err() {
            self.forget();
        }
        opened
    }

    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        while acks.count() < messages.len() {
            let rest = &messages[acks.count()..];
            let window = &rest[..Redis::fitting(rest)];
            match self.window(window, acks).await {
                Err(fault) if is_size(&fault, window) => {
                    self.one_by_one(&messages[acks.count()..][..window.len()], acks).await?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    async fn lost(&mut self) -> Fault {
        if let Some((_, driver)) = &mut self.connection {
            // However it ended, it carries nothing any more.
            drop(driver.await);
            self.connection = None;
        }
        Fault::new(Code::Error, anyhow!("{}: the connection was closed", self.place()))
    }

    async fn close(&mut self) {
        self.forget();
    }
}

fn entry_id(message: &Message) -> String {
    format!("{}-0", message.seq)
}

/// Whether Redis refused an id because it is not above the key's last one.
fn is_id_refused(error: &RedisError) -> bool {
    error.detail().is_some_and(|it| it.contains("equal or smaller than the target stream"))
}

/// Whether a failure can come of the size of one of the messages.
fn is_size(fault: &Fault, messages: &[Message]) -> bool {
    let large = messages.iter().any(|it| it.json.len() >= ARGUMENT_BYTES);
    fault.code == Code::TooLarge || (fault.code == Code::Error && large)
}

fn server_code(code: &str, detail: &str) -> Code {
    match code {
        "OOM" | "MISCONF" => Code::Full,
        "NOAUTH" | "WRONGPASS" | "NOPERM" | "DENIED" => Code::Auth,
        _ if detail.contains("invalid bulk length") => Code::TooLarge,
        _ => Code::Error,
    }
}
