//! What is known of the last crashes, and what follows from it for the streams.
//!
//! One line for each thing that happened: seconds since 1970, what, and the stream or `-`. The signal
//! handler appends crashes, the daemon its starts and what an operator has forgiven.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, Write as _},
    path::Path,
    time::{Duration, SystemTime},
};

use crate::journal::side::Side;

/// In the place of a stream: none, or not known.
pub const NONE: &str = "-";
/// The daemon has started.
const START: &str = "start";
/// The crashes of a stream do not count any more.
const FORGIVEN: &str = "forgiven";

/// A stream that has crashed the daemon so often within [`WITHIN`] is not opened any more.
pub const CRASHES_MAX: usize = 3;
/// What is longer ago does not count.
pub const WITHIN: Duration = Duration::from_secs(3600);

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, to the second.
    pub at: SystemTime,
    /// A signal's name, or what the daemon wrote.
    pub what: String,
    /// Whose thread it was. `None` iff that is not known, or it is about none.
    pub stream: Option<String>,
}

impl Line {
    fn is_crash(&self) -> bool {
        self.what != START && self.what != FORGIVEN
    }

    fn parse(line: &str) -> Option<Line> {
        let mut parts = line.split(' ');
        let seconds = Duration::from_secs(parts.next()?.parse().ok()?);
        let (what, stream) = (parts.next()?.to_owned(), parts.next()?);
        let stream = (stream != NONE).then(|| stream.to_owned());
        Some(Line { at: SystemTime::UNIX_EPOCH.checked_add(seconds)?, what, stream })
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let since = self.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let stream = self.stream.as_deref().unwrap_or(NONE);
        write!(f, "{} {} {stream}", since.as_secs(), self.what)
    }
}

/// What a start has to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How the daemon ended last, if it crashed.
    pub last: Option<Line>,
    /// Streams that count as dangerous, with the crashes that they caused within [`WITHIN`].
    pub dangerous: BTreeMap<String, usize>,
}

/// Reads what is in the file. What is no line of it is left out: a crash can cut one.
pub fn parse(bytes: &[u8]) -> Vec<Line> {
    String::from_utf8_lossy(bytes).lines().filter_map(Line::parse).collect()
}

/// Notes a start: says what happened before it, and forgets what is too long ago to count. Only for
/// the one that owns the journal, before [`super::watch`] opens the file. What is known is given also
/// if the file cannot be read or written, together with why.
pub fn start(side: &Side, now: SystemTime) -> (Report, io::Result<()>) {
    let mut lines = match side.read() {
        Ok(text) => parse(&text.unwrap_or_default()),
        Err(error) => return (Report::default(), Err(error)),
    };
    let report = report(&lines, now);
    lines.retain(|it| counts(it, now));
    lines.push(Line { at: now, what: START.to_owned(), stream: None });
    let text: String = lines.iter().map(|it| format!("{it}\n")).collect();
    (report, side.write(text.as_bytes()))
}

/// The crashes of a stream do not count any more.
///
/// # Errors
/// The file cannot be written.
pub fn forgive(path: &Path, stream: &str, now: SystemTime) -> io::Result<()> {
    let line = Line { at: now, what: FORGIVEN.to_owned(), stream: Some(stream.to_owned()) };
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())
}

/// A clock that was set back does not make a crash count for ever: what is from the future does not.
fn counts(line: &Line, now: SystemTime) -> bool {
    now.duration_since(line.at).is_ok_and(|it| it <= WITHIN)
}

fn report(lines: &[Line], now: SystemTime) -> Report {
    let mut report = Report::default();
    for line in lines {
        report.last = line.is_crash().then(|| line.clone()).or(match &*line.what {
            START => None,
            _ => report.last.take(),
        });
        match &line.stream {
            Some(stream) if !line.is_crash() => drop(report.dangerous.remove(stream)),
            Some(stream) if counts(line, now) => {
                *report.dangerous.entry(stream.clone()).or_default() += 1;
            }
            _ => {}
        }
    }
    report.dangerous.retain(|_, count| CRASHES_MAX <= *count);
    report
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::journal::side::CRASHES;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn dangerous(text: &str, now: u64) -> Vec<(String, usize)> {
        let lines: Vec<_> = text.lines().filter_map(Line::parse).collect();
        report(&lines, at(now)).dangerous.into_iter().collect()
    }

    #[test]
    fn three_crashes_within_an_hour_make_a_stream_dangerous() {
        let text = "100 SIGSEGV a\n200 SIGSEGV b\n300 SIGABRT a\n1000 SIGSEGV -\n";
        assert_eq!(dangerous(text, 1000), []);
        let text = format!("{text}3700 SIGBUS a\n");
        assert_eq!(dangerous(&text, 3700), [("a".to_owned(), 3)], "an hour apart");
        assert_eq!(dangerous(&text, 3701), [], "more than an hour");
        assert_eq!(dangerous(&text, 50), [], "the clock was set back");
    }

    #[test]
    fn what_is_forgiven_does_not_count() {
        let text = "100 SIGSEGV a\n101 SIGSEGV a\n102 SIGSEGV a\n103 forgiven a\n104 SIGSEGV a\n";
        assert_eq!(dangerous(text, 110), []);
    }

    #[test]
    fn a_start_says_how_the_last_run_ended_and_forgets_what_is_old() {
        let folder = tempfile::tempdir().unwrap();
        let side = Side::new(&folder.path().join("journal.db"), CRASHES, true);
        let path = side.path();
        let start = |now| {
            let (report, written) = start(&side, at(now));
            written.unwrap();
            report
        };
        assert_eq!(start(10), Report::default());
        let last = |now| start(now).last.map(|it| it.to_string());
        assert_eq!(last(20), None);
        fs::write(path, b"10 start -\n21 SIGSEGV front\ngarbage\n21 SIG\n\xff\n").unwrap();
        forgive(path, "yard", at(22)).unwrap();
        assert_eq!(last(30).as_deref(), Some("21 SIGSEGV front"));
        assert_eq!(last(40), None, "told once");
        let text = fs::read_to_string(path).unwrap();
        let lines =
            ["10 start -", "21 SIGSEGV front", "22 forgiven yard", "30 start -", "40 start -"];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
        start(3650);
        let text = fs::read_to_string(path).unwrap();
        assert_eq!(text, "3650 start -\n");
    }
}
