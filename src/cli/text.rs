//! An event -> one line for people. Pure, but for the local time zone.
//!
//! Text that came from outside (labels, camera errors) is escaped: it can neither end the line
//! nor steer the terminal.

use std::fmt::Write as _;

use serde_json::Value;
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};

/// In which zone times are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// UTC, with `Z`.
    Utc,
    /// This machine's zone, with its offset.
    Local,
}

/// The line for one event, given as its JSON. What is not an event is shown as it is, escaped.
pub fn event(json: &str, clock: Clock) -> String {
    let Ok(event) = serde_json::from_str::<Value>(json) else {
        return escape(json);
    };
    let text = |it: &Value| escape(it.as_str().unwrap_or_default());
    let when = event["time"].as_str().map_or_else(String::new, |it| time(it, clock));
    let subject = event["subject"].as_str().map_or_else(|| "-".to_owned(), escape);
    let data = &event["data"];
    let what = match event["type"].as_str().unwrap_or_default() {
        "io.ghostwatch.frame.classified.v1" => labels(data),
        "io.ghostwatch.stream.state.v1" => state(data),
        "io.ghostwatch.journal.gap.v1" => gap(data),
        "io.ghostwatch.daemon.v1" => {
            let mut it = format!("daemon {}", text(&data["state"]));
            add(&mut it, ": ", &text(&data["detail"]));
            it
        }
        other => format!("{} {}", escape(other), escape(&data.to_string())),
    };
    format!("{when}  {subject:<12}  {what}")
}

/// The best label with its confidence, and the runners-up in brackets.
fn labels(data: &Value) -> String {
    let mut labels = data["top"].as_array().into_iter().flatten().map(|it| {
        let label = escape(it["label"].as_str().unwrap_or_default());
        let percent = 100.0 * it["confidence"].as_f64().unwrap_or_default();
        (label, percent)
    });
    let Some((best, percent)) = labels.next() else {
        return "no label".to_owned();
    };
    let mut line = format!("{percent:5.1} %  {best}");
    let others: Vec<_> = labels.map(|(it, percent)| format!("{it} {percent:.1}")).collect();
    add(&mut line, "  (", &others.join(", "));
    if !others.is_empty() {
        line.push(')');
    }
    line
}

fn state(data: &Value) -> String {
    let text = |name: &str| escape(data[name].as_str().unwrap_or_default());
    let mut line = text("state");
    add(&mut line, " (was ", &text("previous"));
    if data["previous"].is_string() {
        line.push(')');
    }
    add(&mut line, ", ", &text("code"));
    add(&mut line, ": ", &text("detail"));
    line
}

fn gap(data: &Value) -> String {
    let text = |name: &str| escape(data[name].as_str().unwrap_or_default());
    let count = match data["events"].as_u64() {
        None | Some(0) => "an unknown number of".to_owned(),
        Some(it) => it.to_string(),
    };
    let mut line = format!("gap: {count} events {}", text("reason"));
    add(&mut line, ": ", &text("detail"));
    add(&mut line, "; journal ", &text("journal"));
    add(&mut line, ", moved to ", &text("moved_to"));
    line
}

fn add(line: &mut String, before: &str, text: &str) {
    if !text.is_empty() {
        line.push_str(before);
        line.push_str(text);
    }
}

/// A published time (UTC) as it is shown: to the millisecond, with its offset.
pub fn time(rfc3339: &str, clock: Clock) -> String {
    let Ok(utc) = OffsetDateTime::parse(rfc3339, &Rfc3339) else {
        return escape(rfc3339);
    };
    // The zone's offset at that moment: it may have changed since. Unknown zones show UTC.
    let offset = match clock {
        Clock::Utc => UtcOffset::UTC,
        Clock::Local => UtcOffset::local_offset_at(utc).unwrap_or(UtcOffset::UTC),
    };
    shown(utc.to_offset(offset), clock)
}

fn shown(it: OffsetDateTime, clock: Clock) -> String {
    let (hour, minute, second, milli) = it.to_hms_milli();
    let date = it.date();
    let mut text = format!("{date}T{hour:02}:{minute:02}:{second:02}.{milli:03}");
    match clock {
        Clock::Utc => text.push('Z'),
        Clock::Local => {
            let offset = it.offset();
            let sign = if offset.is_negative() { '-' } else { '+' };
            let (hours, minutes, _) = offset.as_hms();
            let (hours, minutes) = (hours.unsigned_abs(), minutes.unsigned_abs());
            write!(text, "{sign}{hours:02}:{minutes:02}").expect("a string takes all text");
        }
    }
    text
}

/// The text with everything that could steer a terminal or end the line written out: control
/// characters, and the marks that turn the direction of writing.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for it in text.chars() {
        let steers = matches!(it, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if it.is_control() || steers {
            out.extend(it.escape_default());
        } else {
            out.push(it);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn check(kind: &str, subject: &str, data: &str, expected: &str) {
        let json = format!(
            r#"{{"type":"io.ghostwatch.{kind}.v1"{subject},"time":"2026-11-24T01:55:12.301934Z","data":{data}}}"#
        );
        assert_eq!(event(&json, Clock::Utc), format!("2026-11-24T01:55:12.301Z  {expected}"));
    }

    #[test]
    fn each_kind_of_event_is_one_line() {
        let front = r#","subject":"front""#;
        check(
            "frame.classified",
            front,
            r#"{"top":[{"label":"minivan","confidence":0.6123},{"label":"cab","confidence":0.1}]}"#,
            "front          61.2 %  minivan  (cab 10.0)",
        );
        check(
            "stream.state",
            front,
            r#"{"state":"down","previous":"up","code":"timeout","detail":"no answer"}"#,
            "front         down (was up), timeout: no answer",
        );
        check("stream.state", front, r#"{"state":"up"}"#, "front         up");
        check(
            "journal.gap",
            "",
            r#"{"events":7,"reason":"expired"}"#,
            "-             gap: 7 events expired",
        );
        check(
            "journal.gap",
            "",
            r#"{"events":0,"reason":"damaged","journal":"J","moved_to":"/a b","detail":"no\ndatabase"}"#,
            r"-             gap: an unknown number of events damaged: no\ndatabase; journal J, moved to /a b",
        );
        check("daemon", "", r#"{"state":"started"}"#, "-             daemon started");
        check(
            "later.kind",
            "",
            r#"{"a":1}"#,
            "-             io.ghostwatch.later.kind.v1 {\"a\":1}",
        );
    }

    #[test]
    fn text_from_outside_cannot_steer_the_terminal() {
        let detail = r#"{"state":"down","detail":"\u001b[2J\r\n\u009b1m\u202eevil \u00fc"}"#;
        let expected = r"-             down: \u{1b}[2J\r\n\u{9b}1m\u{202e}evil ü";
        check("stream.state", "", detail, expected);
        assert_eq!(event("no JSON\n", Clock::Utc), r"no JSON\n");
    }

    #[test]
    fn local_times_carry_their_offset() {
        let check = |it, expected| assert_eq!(shown(it, Clock::Local), expected);
        check(datetime!(2026-07-01 12:00:00.5 +2), "2026-07-01T12:00:00.500+02:00");
        check(datetime!(2026-01-01 00:00:00 -3:30), "2026-01-01T00:00:00.000-03:30");
        assert_eq!(time("yesterday", Clock::Local), "yesterday");
    }
}
