//! Log output: to standard error, as text or JSON, with a level that can be changed while running.
//!
//! Whatever a camera or a file name puts into a field, one event stays one line without control
//! characters: terminals and log readers act on those.

use std::{
    env, fmt,
    fmt::Write as _,
    io::{self, IsTerminal as _},
    os::unix::fs::MetadataExt as _,
    str::FromStr,
};

use anyhow::Context as _;
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::{Format as Builtin, JsonFields, Writer},
        time::FormatTime,
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt as _,
};

use crate::sink::nats;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `text`, but JSON when standard error is neither a terminal nor the systemd journal.
    #[default]
    Auto,
    /// For people: with time and colour on a terminal; without a time, but with priorities, for
    /// the systemd journal, which knows the time itself.
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for Format {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Format> {
        match text {
            "auto" => Ok(Format::Auto),
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            _ => anyhow::bail!("log.format is {text:?}, not one of auto, text, json"),
        }
    }
}

/// Changes the level of a running log; what `RUST_LOG` says stays on top of it.
#[derive(Clone, Debug)]
pub struct Handle(reload::Handle<EnvFilter, Registry>, Option<String>);

impl Handle {
    /// Sets the level: `error`, `warn`, `info`, `debug`, `trace` or `off`, or directives such as
    /// `info,ghostwatch::source=debug`.
    ///
    /// # Errors
    /// `level` is none of these; the level stays.
    pub fn set_level(&self, level: &str) -> anyhow::Result<()> {
        self.0.reload(filter(level, self.1.as_deref())?).context("changing the log level")
    }
}

/// Starts logging. What `RUST_LOG` says comes on top of the level. Call it before any thread is started: the offset of local time cannot be asked
/// for safely later, and then stays the same until the next start.
///
/// # Errors
/// `level` is not a level, or the process logs already.
pub fn init(level: &str, format: Format) -> anyhow::Result<Handle> {
    let terminal = io::stderr().is_terminal();
    let no_color = env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
    let shape = Shape::choose(format, terminal, is_journal(), no_color);
    let clock = Clock(UtcOffset::current_local_offset().unwrap_or(UtcOffset::UTC));
    let more = env::var("RUST_LOG").ok();
    let (subscriber, handle) = subscriber((level, more), shape, clock, io::stderr)?;
    subscriber.try_init().context("starting the log")?;
    Ok(handle)
}

/// How lines look in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Terminal { colour: bool },
    Journal,
    Json,
}

impl Shape {
    fn choose(format: Format, terminal: bool, journal: bool, no_color: bool) -> Shape {
        match format {
            Format::Json => Shape::Json,
            _ if journal => Shape::Journal,
            Format::Auto if !terminal => Shape::Json,
            _ => Shape::Terminal { colour: terminal && !no_color },
        }
    }
}

/// Whether standard error is the one that systemd has connected to its journal
/// (`$JOURNAL_STREAM`, systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    // Through /proc, as the standard library tells nothing about an open descriptor otherwise.
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

/// What is logged at this level; what `RUST_LOG` says comes on top.
fn filter(level: &str, more: Option<&str>) -> anyhow::Result<EnvFilter> {
    // A directive that comes later is the one that counts. At `error` and `off` libraries are quiet
    // too.
    let quiet = matches!(level, "error" | "off");
    let parts = [(!quiet).then_some(nats::LOG), Some(level), more.filter(|it| !it.is_empty())];
    let parts: Vec<&str> = parts.into_iter().flatten().collect();
    let filter = EnvFilter::builder().parse(parts.join(","));
    filter.with_context(|| {
        let on_top = more.map_or_else(String::new, |it| format!(" and RUST_LOG is {it:?}"));
        format!("log.level is {level:?}{on_top}; try error, warn, info, debug or trace")
    })
}

fn subscriber<W>(
    (level, more): (&str, Option<String>),
    shape: Shape,
    clock: Clock,
    writer: W,
) -> anyhow::Result<(impl Subscriber + Send + Sync, Handle)>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter(level, more.as_deref())?);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let filtered = tracing_subscriber::registry().with(filter);
    let layer: Box<dyn Layer<_> + Send + Sync> = match shape {
        Shape::Json => {
            let format = Builtin::default().json().flatten_event(true).with_timer(clock);
            Box::new(layer.event_format(format).fmt_fields(JsonFields::new()))
        }
        Shape::Journal => Box::new(layer.event_format(Lines { clock: None, colour: false })),
        Shape::Terminal { colour } => {
            Box::new(layer.event_format(Lines { clock: Some(clock), colour }))
        }
    };
    Ok((filtered.with(layer), Handle(handle, more)))
}

/// Local time as of the offset when the process started.
#[derive(Clone, Copy, Debug)]
struct Clock(UtcOffset);

impl FormatTime for Clock {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        let now = OffsetDateTime::now_utc().to_offset(self.0);
        let millis = now.nanosecond() / 1_000_000 * 1_000_000;
        let now = now.replace_nanosecond(millis).map_err(|_| fmt::Error)?;
        w.write_str(&now.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

/// Text lines. Spans are not shown: this crate has none.
struct Lines {
    /// `None` for the systemd journal, which gets a priority instead.
    clock: Option<Clock>,
    colour: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut w: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (colour, name, priority) = match *event.metadata().level() {
            Level::ERROR => ("31", "ERROR", 3),
            Level::WARN => ("33", "WARN ", 4),
            Level::INFO => ("32", "INFO ", 6),
            Level::DEBUG => ("34", "DEBUG", 7),
            Level::TRACE => ("35", "TRACE", 7),
        };
        match &self.clock {
            Some(clock) => {
                clock.format_time(&mut w)?;
                w.write_char(' ')?;
            }
            None => write!(w, "<{priority}>")?,
        }
        if self.colour {
            write!(w, "\x1b[{colour}m{name}\x1b[0m")?;
        } else if self.clock.is_some() {
            w.write_str(name)?;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let gap = if self.clock.is_some() { " " } else { "" };
        writeln!(w, "{gap}{}{}", fields.message, fields.rest)
    }
}

/// An event's fields as text, the message first.
#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn add(&mut self, field: &Field, value: &str) {
        let value = escaped(value);
        if field.name() == "message" {
            self.message = value;
            return;
        }
        let quote = value.is_empty() || value.contains([' ', '=', '"']);
        let written = if quote {
            write!(self.rest, " {}=\"{}\"", field.name(), value.replace('"', "\\\""))
        } else {
            write!(self.rest, " {}={value}", field.name())
        };
        written.expect("writing to a string succeeds");
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, &format!("{value:?}"));
    }
}

/// The text with every control character, and those that turn the direction of writing, as Rust
/// would escape them.
fn escaped(text: &str) -> String {
    let odd = |it: char| {
        it.is_control()
            || matches!(it, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            || matches!(it, '\u{2028}' | '\u{2029}')
    };
    let mut safe = String::with_capacity(text.len());
    for it in text.chars() {
        if odd(it) { safe.extend(it.escape_default()) } else { safe.push(it) }
    }
    safe
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn logged(shape: Shape, log: impl FnOnce(&Handle)) -> String {
        logged_with(None, shape, log)
    }

    fn logged_with(more: Option<&str>, shape: Shape, log: impl FnOnce(&Handle)) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let clock = Clock(UtcOffset::from_hms(2, 0, 0).unwrap());
        let (subscriber, handle) =
            subscriber(("info", more.map(str::to_owned)), shape, clock, move || writer.clone())
                .unwrap();
        tracing::subscriber::with_default(subscriber, || log(&handle));
        sink.text()
    }

    const EVIL: &str = "cam\n<0>forged\x1b[2J\u{202e}\u{9b}x";

    #[test]
    fn control_characters_of_a_camera_never_reach_the_output() {
        for shape in [Shape::Journal, Shape::Terminal { colour: false }, Shape::Json] {
            let text = logged(shape, |_| {
                tracing::warn!(plain = EVIL, display = %EVIL, debug = ?EVIL, "it says {EVIL}");
            });
            assert_eq!(text.lines().count(), 1, "{text:?}");
            let line = text.strip_suffix('\n').unwrap();
            assert!(!line.contains(|it: char| it.is_ascii_control()), "{text:?}");
        }
    }

    #[test]
    fn a_line_for_the_systemd_journal_has_a_priority_and_no_time() {
        let text = logged(Shape::Journal, |_| {
            tracing::warn!(stream = "front", error = %"no route", n = 3, "the stream failed");
            tracing::debug!("not shown");
        });
        assert_eq!(text, "<4>the stream failed stream=front error=\"no route\" n=3\n");
    }

    #[test]
    fn a_line_for_people_has_local_time_with_its_offset_and_colour_only_if_wanted() {
        let text = logged(Shape::Terminal { colour: false }, |_| tracing::info!("up"));
        let (time, rest) = text.split_once(' ').unwrap();
        assert_eq!(rest, "INFO  up\n");
        assert!(time.ends_with("+02:00"), "{time}");
        OffsetDateTime::parse(time, &Rfc3339).unwrap();
        let text = logged(Shape::Terminal { colour: true }, |_| tracing::info!("up"));
        assert!(text.ends_with(" \x1b[32mINFO \x1b[0m up\n"), "{text:?}");
    }

    #[test]
    fn the_level_changes_while_running_and_a_wrong_one_is_refused() {
        let text = logged(Shape::Journal, |handle| {
            tracing::debug!("hidden");
            handle.set_level("debug").unwrap();
            tracing::debug!("shown");
            handle.set_level("warn,ghostwatch::log=trace").unwrap();
            tracing::trace!("shown too");
            assert!(handle.set_level("loud=very").is_err());
            handle.set_level("off").unwrap();
            tracing::error!("hidden");
        });
        assert_eq!(text, "<7>shown\n<7>shown too\n");
    }

    #[test]
    fn a_talkative_library_is_heard_from_warnings_on_unless_rust_log_says_otherwise() {
        let log = |handle: &Handle| {
            tracing::info!(target: "async_nats", "connected");
            tracing::warn!(target: "async_nats", "slow");
            handle.set_level("debug").unwrap();
            tracing::info!(target: "async_nats::connector", "connected");
            handle.set_level("error").unwrap();
            tracing::warn!(target: "async_nats", "quiet");
        };
        assert_eq!(logged(Shape::Journal, log), "<4>slow\n");
        let text = logged_with(Some("async_nats=info"), Shape::Journal, log);
        assert_eq!(text, "<6>connected\n<4>slow\n<6>connected\n<4>quiet\n");
    }

    #[test]
    fn the_shape_follows_where_standard_error_goes() {
        let colour = Shape::Terminal { colour: true };
        let plain = Shape::Terminal { colour: false };
        let check = |format, terminal, journal, no_color, want| {
            assert_eq!(Shape::choose(format, terminal, journal, no_color), want);
        };
        check(Format::Auto, true, false, false, colour);
        check(Format::Auto, true, false, true, plain);
        check(Format::Auto, false, true, false, Shape::Journal);
        check(Format::Auto, false, false, false, Shape::Json);
        check(Format::Text, false, false, false, plain);
        check(Format::Text, false, true, false, Shape::Journal);
        check(Format::Json, true, true, false, Shape::Json);
    }
}
