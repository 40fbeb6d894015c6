//! The fields of a sink, and which of them each type of sink has.

use super::{
    Absent::{Required, Unset},
    Field,
    Kind::{Bool, Choice, Duration, Int, List, Map, Number, Secret, Size, Text},
    TEXT, field,
};

/// The types of sinks.
pub const SINK_TYPES: &[&str] = &["stdout", "file", "nats", "redis", "mqtt", "kafka", "webhook"];

const BROKERS: &[&str] = &["nats", "redis", "mqtt", "kafka", "webhook"];

/// The types that have a field; fields that are not here belong to every sink.
pub const SINK_FIELDS: &[(&str, &[&str])] = &[
    ("path", &["file"]),
    ("rotate_bytes", &["file"]),
    ("keep", &["file"]),
    ("sync", &["file"]),
    ("url", &["redis", "mqtt", "webhook"]),
    ("servers", &["nats", "kafka"]),
    ("prefix", &["nats", "redis", "mqtt", "kafka"]),
    ("username", BROKERS),
    ("password", BROKERS),
    ("password_file", BROKERS),
    ("password_credential", BROKERS),
    ("token_file", &["nats", "webhook"]),
    ("tls", BROKERS),
    ("timeout", BROKERS),
    ("stream", &["nats"]),
    ("max_age", &["nats"]),
    ("max_bytes", &["nats"]),
    ("replicas", &["nats"]),
    ("duplicate_window", &["nats"]),
    ("max_entries", &["redis"]),
    ("client_id", &["mqtt", "kafka"]),
    ("keep_alive", &["mqtt"]),
    ("retain_label", &["mqtt"]),
    ("message_bytes", &["mqtt", "kafka"]),
    ("mechanism", &["kafka"]),
    ("headers", &["webhook"]),
    ("batch_events", &["webhook"]),
    ("batch_bytes", &["webhook"]),
];

/// One sink.
pub const SINK: &[Field] = &[
    field("type", Choice(SINK_TYPES), Required, "What it writes to."),
    field(
        "name",
        Text(63),
        Unset,
        "Names it in metrics, and its place in the journal: a sink with a new name begins with the \
         next event. Written like a stream id. Not set: its type.",
    ),
    field(
        "types",
        List(&Choice(&["frames", "state", "gap", "daemon"]), 1, 4),
        Unset,
        "Only these classes of events. Not set: all.",
    ),
    field(
        "streams",
        List(&Text(63), 1, 1024),
        Unset,
        "Only events of these streams. Not set: of all, and of the daemon.",
    ),
    field(
        "min_confidence",
        Number(0.0, 1.0),
        Unset,
        "Only frames whose best label has at least this confidence.",
    ),
    field("top", Int(1, 5), Unset, "At most so many labels per frame."),
    field("path", Text(TEXT), Unset, "Where to; older ones are PATH.1, PATH.2, …"),
    field(
        "rotate_bytes",
        Size("64KiB", "1TiB"),
        Unset,
        "A file that would grow beyond this is moved aside first [100MiB].",
    ),
    field("keep", Int(0, 1000), Unset, "How many files are kept beside the newest [5]."),
    field(
        "sync",
        Bool,
        Unset,
        "An event counts as written only once the disk has it, not the operating system [false].",
    ),
    field(
        "url",
        Secret(TEXT),
        Unset,
        "redis://host[:6379][/database] or rediss://…; mqtt://host[:1883] or mqtts://…; the http or \
         https URL of a webhook. Without user name and password.",
    ),
    field(
        "servers",
        List(&Text(300), 1, 32),
        Unset,
        "nats: nats://host[:4222] of one cluster. kafka: host:port of some brokers.",
    ),
    field(
        "prefix",
        Text(200),
        Unset,
        "The first part of every name on the broker [nats and kafka: ghostwatch.v1; redis and mqtt: \
         ghostwatch].",
    ),
    field("username", Secret(TEXT), Unset, "User name."),
    field("password", Secret(TEXT), Unset, "Password; better is one of the next two."),
    field("password_file", Text(TEXT), Unset, "A file whose first line is the password."),
    field(
        "password_credential",
        Text(255),
        Unset,
        "The password, as a systemd credential of this name.",
    ),
    field("token_file", Text(TEXT), Unset, "A file with a token, instead of name and password."),
    field(
        "tls",
        Map(SINK_TLS),
        Unset,
        "Whom to trust, and what to show. For nats and kafka it also turns TLS on: `tls: {}`.",
    ),
    field(
        "timeout",
        Duration("1s", "5m"),
        Unset,
        "How long a connection or an acknowledgement may take [10s; mqtt and kafka: 30s].",
    ),
    field("stream", Text(63), Unset, "The JetStream stream; made if it is missing [GHOSTWATCH]."),
    field(
        "max_age",
        Duration("1m", "3650d"),
        Unset,
        "Of a stream that is made: how old messages get.",
    ),
    field("max_bytes", Size("1MiB", "100TiB"), Unset, "Of a stream that is made: its size."),
    field("replicas", Int(1, 5), Unset, "Of a stream that is made: servers that keep it [1]."),
    field(
        "duplicate_window",
        Duration("1s", "24h"),
        Unset,
        "Of a stream that is made: how long the server knows ids, and so drops repetitions [2m].",
    ),
    field(
        "max_entries",
        Int(1, 1_000_000_000),
        Unset,
        "About so many entries per key, the newest.",
    ),
    field(
        "client_id",
        Text(256),
        Unset,
        "Our name on the broker; different for each sink of each daemon [ghostwatch-INSTANCE-NAME].",
    ),
    field(
        "keep_alive",
        Duration("1s", "1h"),
        Unset,
        "How often a silent connection is tried [30s].",
    ),
    field(
        "retain_label",
        Bool,
        Unset,
        "The broker keeps each stream's last label for who comes later [true].",
    ),
    field(
        "message_bytes",
        Size("1KiB", "256MiB"),
        Unset,
        "The largest message that the broker takes; larger ones are set aside [1MiB].",
    ),
    field(
        "mechanism",
        Choice(&["plain", "scram-sha-256", "scram-sha-512"]),
        Unset,
        "How the password is shown [scram-sha-512].",
    ),
    field("headers", List(&Secret(TEXT), 1, 32), Unset, "More headers, each `Name: value`."),
    field("batch_events", Int(1, 10_000), Unset, "Most events in one request [500]."),
    field("batch_bytes", Size("1KiB", "64MiB"), Unset, "Most bytes in one request [1MiB]."),
];

const SINK_TLS: &[Field] = &[
    field("ca_file", Text(TEXT), Unset, "Authorities to trust instead of the system's, PEM."),
    field("cert_file", Text(TEXT), Unset, "The certificate shown to the broker, PEM."),
    field("key_file", Text(TEXT), Unset, "Its private key, PEM."),
];
