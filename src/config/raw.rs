//! The configuration as it is written: every field with its meaning, kind, bounds and default.
//!
//! One table, from which come the checks, the messages, the defaults and the JSON Schema. What it
//! does not list is refused. It knows nothing of how fields depend on each other: see `build`.

pub mod sinks;

use Kind::{Bool, Choice, Duration, Entries, Int, List, Map, Number, Or, Secret, Size, Text, Time};

use sinks::SINK;

/// One field.
#[derive(Debug)]
pub struct Field {
    /// Its key.
    pub name: &'static str,
    /// What can be written.
    pub kind: Kind,
    /// What holds when it is not there.
    pub default: Absent,
    /// What it means.
    pub doc: &'static str,
}

/// What holds when a field is not there.
#[derive(Debug)]
pub enum Absent {
    /// It must be there.
    Required,
    /// Nothing: another field, or the place where it runs, decides.
    Unset,
    /// The same as if this had been written, in YAML.
    Yaml(&'static str),
}

/// What can be written for a field. Bounds are included.
#[derive(Debug)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Int(i64, i64),
    /// A number.
    Number(f64, f64),
    /// A text of 1 to so many bytes; `${env:NAME}` in it is replaced.
    Text(usize),
    /// The same, but it is never quoted in a message.
    Secret(usize),
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A duration with its unit.
    Duration(&'static str, &'static str),
    /// A size in bytes with its unit.
    Size(&'static str, &'static str),
    /// A moment, by RFC 3339.
    Time,
    /// So many of the same.
    List(&'static Kind, usize, usize),
    /// A mapping with these fields.
    Map(&'static [Field]),
    /// A mapping from ids to mappings with these fields.
    Entries(&'static [Field]),
    /// This word (`null`: nothing), or that kind.
    Or(&'static str, &'static Kind),
}

use Absent::{Required, Unset, Yaml};

/// The longest path or text.
const TEXT: usize = 4096;

const fn field(name: &'static str, kind: Kind, default: Absent, doc: &'static str) -> Field {
    Field { name, kind, default, doc }
}

const TRANSPORT: Kind = Choice(&["tcp", "udp", "auto"]);
const LATENCY: Kind = Duration("0ms", "10s");
const STALL_AFTER: Kind = Duration("1s", "1h");
const CLOCK_OFFSET: Kind = Duration("0ms", "1m");
const WHEN_FULL: Kind = Choice(&["auto", "latest", "block"]);
const MAX_FPS: Kind = Or("null", &Number(0.001, 1000.0));
const TRANSPORT_DOC: &str = "How RTP is carried: inside the RTSP connection (tcp), as datagrams \
    (udp), or as datagrams and inside the connection if none come (auto).";
const LATENCY_DOC: &str = "Size of the jitter buffer of RTSP streams: packets that come later than \
    this are lost, and every label is this much later.";
const STALL_AFTER_DOC: &str = "A live stream without a picture for this long (and for five picture \
    periods) has failed and is opened again.";
const CLOCK_OFFSET_DOC: &str = "Events are dated by the camera's clock, as its RTCP reports give it, \
    only while that differs from this host's by at most this; else by the arrival of the pictures, and \
    the clock is called wrong. 0ms: no camera's clock is followed, and none is called wrong.";
const WHEN_FULL_DOC: &str = "When frames come faster than they are classified: keep the newest one \
    (latest), or let the source wait and lose none (block). auto: latest for live streams, block \
    for files and test patterns.";
const DECODE: Kind = Choice(&["auto", "software", "va", "nv"]);
const DECODE_DOC: &str = "Who decodes: the CPU (software), VA-API (va), NVDEC (nv), or the first of \
    NVDEC, VA-API and the CPU that is there and opens (auto). Where a device is not there, does not \
    open or fails, the CPU decodes. Broken pictures are found only where the CPU decodes.";
const MAX_FPS_DOC: &str = "At most so many frames per second are classified, sampled by their \
    time; null: every frame.";
const FROZEN_AFTER: Kind = Or("off", &Duration("1s", "24h"));
const HEALTH_DOC: &str = "What to do about pictures that show nothing: frozen, dark, uniform, \
    smeared.";
const FROZEN_AFTER_DOC: &str = "A picture that stays the same for this long, and for three \
    keyframes, is frozen; off: never.";
const LABEL_BAD_DOC: &str = "Whether such pictures are labelled like others; if not, they are \
    dropped with reason `corrupt`.";
const LABEL_CORRUPT_DOC: &str = "Whether pictures are labelled that the decoder marked as broken or \
    before which something was lost, and those after them until the next keyframe; if not, they are \
    dropped with reason `corrupt`.";

/// The whole file.
pub const ROOT: &[Field] = &[
    field("version", Int(1, 1), Required, "The version of this format."),
    field(
        "instance",
        Or("null", &Text(64)),
        Yaml("null"),
        "Names this daemon in the events' `source`: letters, digits, `.`, `_`, `-`. null: the host's \
         name.",
    ),
    field(
        "defaults",
        Map(DEFAULTS),
        Yaml("{}"),
        "What holds for streams that do not say otherwise.",
    ),
    field(
        "streams",
        Entries(STREAM),
        Yaml("{}"),
        "The streams by id. An id has 1 to 63 of a-z, 0-9, `_`, `-`, and starts with a letter or \
         digit.",
    ),
    field(
        "model",
        Map(MODEL),
        Yaml("{}"),
        "The network. What is null comes from the weights file.",
    ),
    field("device", Map(DEVICE), Yaml("{}"), "Where the network runs."),
    field("batch", Map(BATCH), Yaml("{}"), "How frames of all streams are put into batches."),
    field("journal", Map(JOURNAL), Yaml("{}"), "The embedded event log."),
    field("sinks", List(&Map(SINK), 0, 16), Yaml("[]"), "Where events go besides the journal."),
    field("http", Map(HTTP), Yaml("{}"), "Metrics, health and the read API."),
    field("log", Map(LOG), Yaml("{}"), "The daemon's own log, on standard error."),
    field("limits", Map(LIMITS), Yaml("{}"), "Bounds against mistakes and hostile streams."),
];

const DEFAULTS: &[Field] = &[
    field("max_fps", MAX_FPS, Yaml("null"), MAX_FPS_DOC),
    field("transport", TRANSPORT, Yaml("tcp"), TRANSPORT_DOC),
    field("latency", LATENCY, Yaml("200ms"), LATENCY_DOC),
    field("stall_after", STALL_AFTER, Yaml("4s"), STALL_AFTER_DOC),
    field("max_clock_offset", CLOCK_OFFSET, Yaml("2s"), CLOCK_OFFSET_DOC),
    field("when_full", WHEN_FULL, Yaml("auto"), WHEN_FULL_DOC),
    field("decode", DECODE, Yaml("software"), DECODE_DOC),
    field(
        "health",
        Map(&[
            field("frozen_after", FROZEN_AFTER, Yaml("30s"), FROZEN_AFTER_DOC),
            field("label_bad_pictures", Bool, Yaml("true"), LABEL_BAD_DOC),
            field("label_corrupt_pictures", Bool, Yaml("false"), LABEL_CORRUPT_DOC),
        ]),
        Yaml("{}"),
        HEALTH_DOC,
    ),
];

/// One stream.
pub const STREAM: &[Field] = &[
    field(
        "url",
        Secret(TEXT),
        Required,
        "A path, or a file:, rtsp:, rtsps:, http:, https: or test: URL, such as \
         `test:?size=640x360&fps=15`.",
    ),
    field("username", Secret(TEXT), Unset, "User name for the camera."),
    field(
        "password",
        Secret(TEXT),
        Unset,
        "Password for the camera; meant for `${env:NAME}`, since others may read this file.",
    ),
    field(
        "password_file",
        Text(TEXT),
        Unset,
        "A file with the password; its last line end is left out.",
    ),
    field(
        "password_credential",
        Text(255),
        Unset,
        "The name of a systemd credential with the password ($CREDENTIALS_DIRECTORY/NAME).",
    ),
    field("max_fps", MAX_FPS, Unset, MAX_FPS_DOC),
    field("transport", TRANSPORT, Unset, TRANSPORT_DOC),
    field("latency", LATENCY, Unset, LATENCY_DOC),
    field("stall_after", STALL_AFTER, Unset, STALL_AFTER_DOC),
    field("max_clock_offset", CLOCK_OFFSET, Unset, CLOCK_OFFSET_DOC),
    field("when_full", WHEN_FULL, Unset, WHEN_FULL_DOC),
    field("decode", DECODE, Unset, DECODE_DOC),
    field(
        "health",
        Map(&[
            field("frozen_after", FROZEN_AFTER, Unset, FROZEN_AFTER_DOC),
            field("label_bad_pictures", Bool, Unset, LABEL_BAD_DOC),
            field("label_corrupt_pictures", Bool, Unset, LABEL_CORRUPT_DOC),
        ]),
        Yaml("{}"),
        HEALTH_DOC,
    ),
    field("loop", Bool, Yaml("false"), "A file starts over when it has ended, in a new epoch."),
    field(
        "realtime",
        Bool,
        Yaml("false"),
        "A file or test pattern comes at its own rate instead of as fast as it can be classified.",
    ),
    field(
        "start_time",
        Or("null", &Time),
        Yaml("null"),
        "When a file was recorded; its events' time is this plus the place in the file. null: when \
         the frame was read.",
    ),
    field(
        "weight",
        Int(1, 100),
        Yaml("1"),
        "Its share when all streams together are more than the device can do.",
    ),
    field("tls", Map(TLS), Yaml("{}"), "Whom rtsps: and https: streams trust."),
];

const TLS: &[Field] = &[
    field("verify", Bool, Yaml("true"), "Whether the camera's certificate is checked at all."),
    field(
        "ca_file",
        Or("null", &Text(TEXT)),
        Yaml("null"),
        "Certificates (PEM) to trust instead of the system's.",
    ),
    field(
        "fingerprint",
        Or("null", &Text(128)),
        Yaml("null"),
        "The one certificate to trust, whoever has signed it and for whatever name: `sha256:` and \
         the SHA-256 of the certificate (DER) in hex. For rtsps: streams.",
    ),
];

const CHANNELS: Kind = Or("null", &List(&Number(0.0, 1.0), 3, 3));

const MODEL: &[Field] = &[
    field(
        "weights",
        Text(TEXT),
        Yaml("weights/ghostnet-1x-demo.safetensors"),
        "The checkpoint: .safetensors, or a PyTorch .pth.",
    ),
    field(
        "labels",
        Or("null", &Text(TEXT)),
        Yaml("null"),
        "One class per line, as many as the network has classes. null: the list that belongs to \
         the weights.",
    ),
    field("name", Or("null", &Text(64)), Yaml("null"), "The model's name in events and metrics."),
    field(
        "resize",
        Or("null", &Int(16, 4096)),
        Yaml("null"),
        "Pixels that the picture's short side is scaled to.",
    ),
    field(
        "input",
        Or("null", &Int(16, 1024)),
        Yaml("null"),
        "Side in pixels of the square that is cut out of its centre; at most `resize`.",
    ),
    field("mean", CHANNELS, Yaml("null"), "Subtracted from red, green and blue in 0..1."),
    field(
        "std",
        Or("null", &List(&Number(0.001, 10.0), 3, 3)),
        Yaml("null"),
        "What red, green and blue are then divided by.",
    ),
];

const DEVICE: &[Field] = &[
    field(
        "use",
        Text(16),
        Yaml("auto"),
        "auto (the GPU if it works, else native), native (the CPU with our own engine), cpu (the CPU \
         with libtorch), or cuda:N. A build without libtorch has auto and native.",
    ),
    field(
        "precision",
        Choice(&["auto", "fp32", "bf16", "fp16"]),
        Yaml("auto"),
        "auto: fp32 on the CPU; on a GPU half precision if the self-test agrees.",
    ),
    field(
        "lanes",
        Or("auto", &Int(1, 256)),
        Yaml("auto"),
        "Batches that are computed at once. auto: one per GPU, or one single-threaded lane per \
         core.",
    ),
    field(
        "cuda",
        Or("null", &Text(TEXT)),
        Yaml("null"),
        "The folder with the CUDA libraries. null: $GHOSTWATCH_CUDA, or beside the program.",
    ),
];

const BATCH: &[Field] = &[
    field("max_size", Int(1, 256), Yaml("32"), "Frames in the largest batch."),
    field(
        "max_wait",
        Duration("0ms", "1s"),
        Yaml("5ms"),
        "A batch is closed at the latest this long after its oldest frame.",
    ),
    field(
        "buckets",
        Or("auto", &List(&Int(1, 256), 1, 16)),
        Yaml("auto"),
        "Sizes that batches are padded to, each warmed at start; the largest must be `max_size`.",
    ),
];

const JOURNAL: &[Field] = &[
    field(
        "path",
        Text(TEXT),
        Unset,
        "The file. Not set: $STATE_DIRECTORY/journal.db under systemd, else data/journal.db.",
    ),
    field("retain", Map(RETAIN), Yaml("{}"), "How much is kept. The oldest events go first."),
    field(
        "commit_every",
        Duration("1ms", "10s"),
        Yaml("100ms"),
        "Events are on disk, and visible to readers, at the latest after this time.",
    ),
];

const RETAIN: &[Field] = &[
    field(
        "bytes",
        Or("null", &Size("1MiB", "1024TiB")),
        Yaml("20GiB"),
        "Size of the file; null: no bound.",
    ),
    field(
        "age",
        Or("null", &Duration("1m", "36500d")),
        Yaml("7d"),
        "Age of an event; null: no bound.",
    ),
    field(
        "keep_free",
        Size("0B", "1024TiB"),
        Yaml("2GiB"),
        "This much of the file system stays free for others.",
    ),
];

const HTTP: &[Field] = &[
    field(
        "listen",
        Text(64),
        Yaml("127.0.0.1:9464"),
        "Address and port. Other than loopback only with `token_file`.",
    ),
    field(
        "token_file",
        Or("null", &Text(TEXT)),
        Yaml("null"),
        "A file with the token that clients send, as Bearer or as the password of HTTP Basic.",
    ),
    field(
        "hosts",
        List(&Text(253), 0, 64),
        Yaml("[]"),
        "Host names that clients may use, besides localhost and the address itself.",
    ),
];

const LOG: &[Field] = &[
    field(
        "level",
        Choice(&["error", "warn", "info", "debug", "trace"]),
        Yaml("info"),
        "The least level that is logged.",
    ),
    field(
        "format",
        Choice(&["auto", "text", "json"]),
        Yaml("auto"),
        "auto: text on a terminal, else json.",
    ),
];

const LIMITS: &[Field] = &[
    field("max_streams", Int(1, 1024), Yaml("256"), "Streams in this file."),
    field("max_width", Int(16, 16384), Yaml("7680"), "Width in pixels of a stream's picture."),
    field("max_height", Int(16, 16384), Yaml("4320"), "Height in pixels of a stream's picture."),
];
