//! What is configured about sinks: plain data, the same in the configuration and in the broker's
//! own file, which says what it does with it.

use std::{path::PathBuf, time::Duration};

use anyhow::{anyhow, bail, ensure};

use crate::{cli::text::Clock, secret::Secret, sink::broker::Topic};

/// What a sink writes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// Lines for people on standard output.
    Text(Clock),
    /// NDJSON on standard output.
    Stdout,
    /// NDJSON in a file that is moved aside when it has grown.
    File(PathBuf, Rotation),
    /// NATS JetStream.
    Nats(Nats),
    /// Redis Streams.
    Redis(Redis),
    /// MQTT 3.1.1.
    Mqtt(Mqtt),
    /// Apache Kafka.
    Kafka(Kafka),
    /// HTTP requests.
    Webhook(Webhook),
}

/// Which events a sink gets. The default is all, whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Select {
    /// Of these topics; of all, if empty.
    pub topics: Vec<Topic>,
    /// Of these streams; of all, and of the daemon, if empty.
    pub streams: Vec<String>,
    /// Frames only whose best label has at least this confidence.
    pub min_confidence: Option<f32>,
    /// At most so many labels per frame.
    pub top: Option<usize>,
}

/// How a file of events rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// A file that would grow beyond this is moved aside first.
    pub bytes: u64,
    /// How many files are kept beside the newest.
    pub keep: u32,
    /// Whether a flush waits until the disk has it.
    pub sync: bool,
}

/// How a connection is protected and to whom it is trusted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tls {
    /// Certificates to trust instead of the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// The certificate shown to the broker, PEM; `Some` iff `key_file` is.
    pub cert_file: Option<PathBuf>,
    /// Its private key, PEM.
    pub key_file: Option<PathBuf>,
}

/// Who we are to the broker.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Login {
    /// The user.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// A token, instead of both.
    pub token: Option<Secret>,
}

/// A setting that cannot work, however the broker is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Unusable {
    /// The field of the configuration.
    pub field: &'static str,
    /// Why, with the value unless that can be a secret.
    pub why: String,
}

impl Unusable {
    /// A field and why it cannot work.
    pub fn new(field: &'static str, why: impl Into<String>) -> Unusable {
        Unusable { field, why: why.into() }
    }

    /// An error unless `good`.
    fn unless(good: bool, field: &'static str, why: impl Into<String>) -> Result<(), Unusable> {
        if good { Ok(()) } else { Err(Unusable::new(field, why)) }
    }
}

/// Where the servers are, and what is written there.
#[derive(Clone, Debug, PartialEq)]
pub struct Nats {
    /// URLs of the servers of one cluster, without secrets; the first that answers is taken.
    pub servers: Vec<String>,
    /// The first parts of the subjects.
    pub subject_prefix: String,
    /// The stream's name.
    pub stream: String,
    /// What the stream is like if it has to be made. One that is there is never changed.
    pub create: NatsStream,
    /// TLS, also if the server does not insist.
    pub tls: Option<Tls>,
    /// User and password, or a token.
    pub login: Login,
    /// How long a connection, or an acknowledgement, may take.
    pub timeout: Duration,
}

/// What a stream is like that has to be made. It is kept in files, and its oldest messages go when
/// it is full.
#[derive(Clone, Debug, PartialEq)]
pub struct NatsStream {
    /// Messages older than this go; `None` for never.
    pub max_age: Option<Duration>,
    /// The oldest messages go beyond so many bytes; `None` for never.
    pub max_bytes: Option<u64>,
    /// On how many servers of the cluster it is kept.
    pub replicas: usize,
    /// How long the server knows the ids of messages.
    pub duplicate_window: Duration,
}

impl Default for NatsStream {
    fn default() -> NatsStream {
        NatsStream {
            max_age: None,
            max_bytes: None,
            replicas: 1,
            duplicate_window: Duration::from_secs(120),
        }
    }
}

/// Where the server is, and what is written there.
#[derive(Clone, Debug, PartialEq)]
pub struct Redis {
    /// The server's name or address.
    pub host: String,
    /// Its port; 6379 is usual.
    pub port: u16,
    /// The number of the database; 0 is usual.
    pub database: u32,
    /// The first part of the keys: `<prefix>:<journal id>:<topic>`.
    pub key_prefix: String,
    /// About so many entries are kept in each key, the newest; `None` for all.
    pub max_entries: Option<u64>,
    /// TLS, if the server wants it.
    pub tls: Option<Tls>,
    /// A user of the server's access control list, or a password alone.
    pub login: Login,
    /// How long connecting or one window may take.
    pub timeout: Duration,
}

/// Where a broker listens.
#[derive(Clone, Debug, PartialEq)]
pub struct Address {
    /// With TLS.
    pub tls: bool,
    /// Name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Address {
    /// Reads `mqtt://host[:1883]` or `mqtts://host[:8883]`.
    ///
    /// # Errors
    /// It is something else. User and password have settings of their own, so that URLs can be
    /// printed.
    pub fn parse(url: &str) -> anyhow::Result<Address> {
        let (address, path) = Address::of(url, ["mqtt", "mqtts"], [1883, 8883])?;
        ensure!(path.is_empty(), "nothing can stand after the port");
        Ok(address)
    }

    /// Reads `scheme://host[:port][/path]`; the second of the schemes and ports is the one with
    /// TLS. Gives what stands after the slash, too.
    ///
    /// # Errors
    /// It is something else.
    pub fn of<'a>(
        url: &'a str,
        [plain, secure]: [&str; 2],
        ports: [u16; 2],
    ) -> anyhow::Result<(Address, &'a str)> {
        let (tls, rest) = match url.split_once("://") {
            Some((scheme, rest)) if scheme == plain => (false, rest),
            Some((scheme, rest)) if scheme == secure => (true, rest),
            _ => bail!("the URL must start with {plain}:// or {secure}://"),
        };
        ensure!(!rest.contains('@'), "user and password go into `username` and `password`");
        let (rest, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match rest.rsplit_once(':') {
            // A colon inside brackets belongs to an IPv6 address.
            Some((host, port)) if !port.ends_with(']') => {
                let port = port.parse().map_err(|_| anyhow!("{port:?} is not a TCP port"))?;
                (host, port)
            }
            _ => (rest, ports[usize::from(tls)]),
        };
        let odd = |it: char| !(it.is_ascii_alphanumeric() || "-._[]:".contains(it));
        ensure!(!host.is_empty() && !host.contains(odd), "{host:?} is not a host name");
        Ok((Address { tls, host: host.to_owned(), port }, path))
    }
}

/// How to reach a broker and what to do there.
#[derive(Clone, Debug, PartialEq)]
pub struct Mqtt {
    /// Where it listens.
    pub address: Address,
    /// The first part of every topic.
    pub topic_prefix: String,
    /// Our name there. Stable, so that the broker ends an old connection when a new one comes;
    /// different for each sink of each daemon, or they would end each other's.
    pub client_id: String,
    /// How often a silent connection is tried; at least a second.
    pub keep_alive: Duration,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// The connection is given up if the oldest event in flight is not acknowledged for so long.
    pub ack_timeout: Duration,
    /// Events in flight; at least 1.
    pub max_inflight: u16,
    /// The largest packet that the broker takes. 3.1.1 has no way to ask it.
    pub packet_bytes_max: usize,
    /// The last label of each stream is kept on the broker for whoever subscribes later.
    pub retain_label: bool,
    /// Whom to trust.
    pub tls: Tls,
    /// Who we are. A token is sent as the password.
    pub login: Login,
}

impl Mqtt {
    /// The settings that nobody needs to change.
    pub fn new(address: Address, client_id: impl Into<String>) -> Mqtt {
        Mqtt {
            address,
            topic_prefix: "ghostwatch".into(),
            client_id: client_id.into(),
            keep_alive: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            ack_timeout: Duration::from_secs(30),
            max_inflight: 100,
            packet_bytes_max: 1 << 20,
            retain_label: true,
            tls: Tls::default(),
            login: Login::default(),
        }
    }

    /// Checks what the client library would panic at or a broker would misunderstand.
    ///
    /// # Errors
    /// What is wrong with which setting.
    pub fn check(&self) -> Result<(), Unusable> {
        let prefix = &self.topic_prefix;
        let odd = |it: char| it.is_control() || "+#".contains(it);
        Unusable::unless(
            (1..=256).contains(&prefix.len()) && !prefix.starts_with('$') && !prefix.contains(odd),
            "prefix",
            format!(
                "{prefix:?} must have 1 to 256 bytes, no `+`, `#` or control characters, and no `$` in front"
            ),
        )?;
        let client = &self.client_id;
        Unusable::unless(
            (1..=256).contains(&client.len()),
            "client_id",
            format!("{client:?} must have 1 to 256 bytes"),
        )?;
        let alive = self.keep_alive.as_secs();
        Unusable::unless(
            (1..=u64::from(u16::MAX)).contains(&alive),
            "keep_alive",
            format!("{alive} s must be between 1 s and 65535 s"),
        )?;
        Unusable::unless(0 < self.max_inflight, "type", "max_inflight must be at least 1")
    }

    /// Why two sinks cannot be: what they write under the same names differs, and the broker ends
    /// the older connection of two with one name.
    pub fn clash(&self, other: &Mqtt) -> Option<Unusable> {
        let Address { host, port, .. } = &self.address;
        let same_host = host.eq_ignore_ascii_case(&other.address.host);
        if !same_host || *port != other.address.port {
            return None;
        }
        let (prefix, client) = (&self.topic_prefix, &self.client_id);
        if *prefix == other.topic_prefix {
            let why = format!(
                "{prefix:?} on {host}:{port} too: both would write {prefix}/available and the last labels"
            );
            return Some(Unusable::new("prefix", why));
        }
        let why = format!("{client:?} on {host}:{port} too: the broker would end one connection");
        (*client == other.client_id).then(|| Unusable::new("client_id", why))
    }
}

/// How a password is shown to the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// As it is; only sensible with TLS.
    Plain,
    /// SCRAM with SHA-256.
    ScramSha256,
    /// SCRAM with SHA-512.
    ScramSha512,
}

/// How to reach a cluster and what to do there.
#[derive(Clone, Debug, PartialEq)]
pub struct Kafka {
    /// `host:port` of some of its brokers; they know the others.
    pub servers: Vec<String>,
    /// The first part of every topic's name.
    pub topic_prefix: String,
    /// Our name in the broker's logs and quotas.
    pub client_id: String,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// The connection is given up if the oldest event in flight is not acknowledged for so long.
    pub ack_timeout: Duration,
    /// Events in flight; at least 1.
    pub max_inflight: usize,
    /// The largest message, and batch of messages, that is sent. At or under the broker's
    /// `message.max.bytes` and the topics' `max.message.bytes`.
    pub message_bytes_max: usize,
    /// Partitions of a topic that is made because it is missing; -1 for the broker's default.
    pub partitions: i32,
    /// Its replicas; -1 for the broker's default.
    pub replicas: i32,
    /// `Some` iff the connection is protected.
    pub tls: Option<Tls>,
    /// How the password is shown.
    pub mechanism: Mechanism,
    /// Who we are; with a user name iff the broker asks for SASL.
    pub login: Login,
}

impl Kafka {
    /// The settings that nobody needs to change.
    pub fn new(servers: Vec<String>, client_id: impl Into<String>) -> Kafka {
        Kafka {
            servers,
            topic_prefix: "ghostwatch.v1".into(),
            client_id: client_id.into(),
            connect_timeout: Duration::from_secs(10),
            ack_timeout: Duration::from_secs(30),
            max_inflight: 1_000,
            message_bytes_max: 1_000_000,
            partitions: -1,
            replicas: -1,
            tls: None,
            mechanism: Mechanism::ScramSha512,
            login: Login::default(),
        }
    }

    /// Checks what a broker would refuse only later.
    ///
    /// # Errors
    /// What is wrong with which setting.
    pub fn check(&self) -> Result<(), Unusable> {
        let prefix = &self.topic_prefix;
        let plain = |it: char| it.is_ascii_alphanumeric() || "._-".contains(it);
        Unusable::unless(
            (1..=200).contains(&prefix.len()) && prefix.chars().all(plain),
            "prefix",
            format!("{prefix:?} must have 1 to 200 of the letters, digits, `.`, `_` and `-`"),
        )?;
        let odd = |it: &String| it.is_empty() || it.contains([',', '/', '@', ' ']);
        let good = !self.servers.is_empty() && !self.servers.iter().any(odd);
        Unusable::unless(good, "servers", "it must be a list of host:port")?;
        let most = self.max_inflight;
        Unusable::unless(
            (1..=100_000).contains(&most),
            "type",
            format!("max_inflight is {most} and must be 1 to 100000"),
        )?;
        let bytes = self.message_bytes_max;
        Unusable::unless(
            (1_000..=1_000_000_000).contains(&bytes),
            "message_bytes",
            format!("{bytes} must be between 1000 and 1000000000"),
        )?;
        let no_token = self.login.token.is_none();
        let why = "Kafka takes a user name and a password, not a token";
        Unusable::unless(no_token, "token_file", why)
    }

    /// The name of a topic.
    pub fn topic(&self, topic: Topic) -> String {
        format!("{}.{}", self.topic_prefix, topic.name())
    }
}

/// Where events are sent, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Webhook {
    /// The `http` or `https` URL. Its path and query may hold a secret and are never shown.
    pub url: Secret,
    /// Headers more.
    pub headers: Vec<(String, Secret)>,
    /// A token is sent as `Bearer`, a user and password as `Basic`.
    pub login: Login,
    /// At most so many events in one request.
    pub batch_events: usize,
    /// At most so many bytes in one request, unless a single event has more.
    pub batch_bytes: usize,
    /// What `https` trusts and shows.
    pub tls: Tls,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long a request may take, its answer included.
    pub timeout: Duration,
}
