//! What is known of the last crashes, and what follows from it for the streams.
//!
//! One line for each thing that happened: seconds since 1970, what, and the stream or `-`. The signal
//! handler appends crashes, the daemon its starts and what an operator has forgiven. A `start` that
//! names a stream goes on with the digest of its plan: crashes count for the plan they happened under.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use crate::journal::side::Side;

/// In the place of a stream: none, or not known.
pub const NONE: &str = "-";
/// The daemon has started; or it runs a stream by this plan from now on.
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
    /// The digest of the stream's plan. `Some` iff it says what the stream is run by.
    pub plan: Option<String>,
}

impl Line {
    fn new(at: SystemTime, what: &str, stream: Option<&str>, plan: Option<&str>) -> Line {
        let (stream, plan) = (stream.map(str::to_owned), plan.map(str::to_owned));
        Line { at, what: what.to_owned(), stream, plan }
    }

    fn is_crash(&self) -> bool {
        self.what != START && self.what != FORGIVEN
    }

    fn parse(line: &str) -> Option<Line> {
        let mut parts = line.split(' ');
        let seconds = Duration::from_secs(parts.next()?.parse().ok()?);
        let (what, stream) = (parts.next()?.to_owned(), parts.next()?);
        let stream = (stream != NONE).then(|| stream.to_owned());
        let plan = parts.next().map(str::to_owned);
        Some(Line { at: SystemTime::UNIX_EPOCH.checked_add(seconds)?, what, stream, plan })
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let since = self.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let stream = self.stream.as_deref().unwrap_or(NONE);
        write!(f, "{} {} {stream}", since.as_secs(), self.what)?;
        self.plan.iter().try_for_each(|it| write!(f, " {it}"))
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

/// Notes a start: says what happened before it, and forgets what is too long ago to count. `plans`:
/// the digests of the configured streams' plans. The crashes of one that is planned otherwise now do
/// not count any more. Only for the one that owns the journal, before [`super::watch`] opens the file.
/// What is known is given also if the file cannot be read or written, together with why.
pub fn start(
    side: &Side,
    plans: &BTreeMap<String, String>,
    now: SystemTime,
) -> (Report, io::Result<()>) {
    let mut lines = match read(side) {
        Ok(lines) => lines,
        Err(error) => return (Report::default(), Err(error)),
    };
    let Report { last, .. } = report(&lines, now);
    let mut new = Vec::new();
    for (stream, plan) in plans {
        let before = planned(&lines).remove(&**stream).and_then(|it| lines[it].plan.clone());
        if before.as_ref() == Some(plan) {
            continue;
        }
        if before.is_some() {
            new.push(Line::new(now, FORGIVEN, Some(stream), None));
        }
        new.push(Line::new(now, START, Some(stream), Some(plan)));
    }
    new.push(Line::new(now, START, None, None));
    let appended = new.len();
    lines.append(&mut new);
    let report = Report { last, ..report(&lines, now) };
    let by_now = planned(&lines);
    let is_kept = |(i, it): &(usize, &Line)| {
        let configured = it.stream.as_ref().filter(|it| plans.contains_key(*it));
        counts(it, now) || configured.is_some_and(|id| by_now.get(&**id) == Some(i))
    };
    let kept: Vec<_> = lines.iter().enumerate().filter(is_kept).map(|it| it.1).collect();
    let written = side.write(text(kept).as_bytes());
    // Without room for a new file there may be some in the old one. What is noted nowhere is told again
    // by the next start.
    let written = written.inspect_err(|_| {
        append(side.path(), &lines[lines.len() - appended..]).ok();
    });
    (report, written)
}

/// What is in the file. One that cannot be read is moved away: nothing could be written to it either.
fn read(side: &Side) -> io::Result<Vec<Line>> {
    let error = match side.read() {
        Ok(text) => return Ok(parse(&text.unwrap_or_default())),
        Err(error) => error,
    };
    let Ok(aside) = side.set_aside() else { return Err(error) };
    let file = aside.file.display();
    tracing::error!(%error, %file, "the record of crashes cannot be read: a new one is begun");
    Ok(Vec::new())
}

/// The last line that says what a stream is run by, by stream.
fn planned(lines: &[Line]) -> BTreeMap<&str, usize> {
    let planned = |(i, it): (usize, &'_ Line)| it.plan.is_some().then_some(i);
    let planned = lines.iter().enumerate().filter_map(planned);
    planned.filter_map(|i| Some((lines[i].stream.as_deref()?, i))).collect()
}

fn text<'a>(lines: impl IntoIterator<Item = &'a Line>) -> String {
    lines.into_iter().map(|it| format!("{it}\n")).collect()
}

fn append(path: &Path, lines: &[Line]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.create(true).append(true).mode(0o600).open(path)?;
    file.write_all(text(lines).as_bytes())
}

/// The crashes of a stream do not count any more.
///
/// # Errors
/// The file cannot be written.
pub fn forgive(path: &Path, stream: &str, now: SystemTime) -> io::Result<()> {
    append(path, &[Line::new(now, FORGIVEN, Some(stream), None)])
}

/// A stream is run by another plan from now on: its crashes do not count any more.
///
/// # Errors
/// The file cannot be written.
pub fn changed(path: &Path, stream: &str, plan: &str, now: SystemTime) -> io::Result<()> {
    let forgiven = Line::new(now, FORGIVEN, Some(stream), None);
    append(path, &[forgiven, Line::new(now, START, Some(stream), Some(plan))])
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
            Some(stream) if line.what == FORGIVEN => drop(report.dangerous.remove(stream)),
            Some(stream) if line.is_crash() && counts(line, now) => {
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
            let (report, written) = start(&side, &BTreeMap::new(), at(now));
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

    #[test]
    fn crashes_count_for_the_plan_that_they_happened_under() {
        let folder = tempfile::tempdir().unwrap();
        let side = Side::new(&folder.path().join("journal.db"), CRASHES, true);
        let start = |now, plan: &str| {
            let plans = ["a", "b"].map(|it| (it.to_owned(), plan.to_owned()));
            let (report, written) = start(&side, &plans.into(), at(now));
            written.unwrap();
            report.dangerous.into_iter().collect::<Vec<_>>()
        };
        let crash = |now| {
            let line = Line::new(at(now), "SIGSEGV", Some("a"), None);
            append(side.path(), &[line.clone(), line.clone(), line]).unwrap();
        };
        crash(10);
        // What an earlier version has written does not say under which plan.
        assert_eq!(start(20, "1f"), [("a".to_owned(), 3)]);
        assert_eq!(start(30, "2f"), [], "it was changed while the daemon was down");
        assert_eq!(start(40, "2f"), []);
        crash(50);
        assert_eq!(start(60, "2f"), [("a".to_owned(), 3)]);
        changed(side.path(), "a", "3f", at(70)).unwrap();
        assert_eq!(start(80, "3f"), [], "it was changed while the daemon ran");
        crash(90);
        assert_eq!(start(100, "3f"), [("a".to_owned(), 3)]);
        // Long after, the plan is known still, and there is one line of it.
        assert_eq!(start(10_000, "3f"), []);
        let text = fs::read_to_string(side.path()).unwrap();
        let lines = ["70 start a 3f", "80 start b 3f", "10000 start -"];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn a_crash_is_told_once_also_if_the_file_cannot_be_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let side = Side::new(&folder.path().join("journal.db"), CRASHES, true);
        fs::write(side.path(), "21 SIGSEGV front\n").unwrap();
        // The device says that no space is left.
        let new = folder.path().join("journal.crashes.new");
        std::os::unix::fs::symlink("/dev/full", new).unwrap();
        let plans = BTreeMap::from([("front".to_owned(), "1f".to_owned())]);
        let start = |now| {
            let (report, written) = start(&side, &plans, at(now));
            assert_eq!(written.unwrap_err().kind(), io::ErrorKind::StorageFull);
            report.last.map(|it| it.to_string())
        };
        assert_eq!(start(30).as_deref(), Some("21 SIGSEGV front"));
        assert_eq!(start(40), None);
        let text = fs::read_to_string(side.path()).unwrap();
        let lines = ["21 SIGSEGV front", "30 start front 1f", "30 start -", "40 start -"];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_moved_away() {
        let folder = tempfile::tempdir().unwrap();
        let side = Side::new(&folder.path().join("journal.db"), CRASHES, true);
        fs::create_dir(side.path()).unwrap();
        let (report, written) = start(&side, &BTreeMap::new(), at(10));
        written.unwrap();
        assert_eq!(report, Report::default());
        assert_eq!(fs::read_to_string(side.path()).unwrap(), "10 start -\n");
        assert!(folder.path().join("journal.crashes.damaged").is_dir());
    }
}
