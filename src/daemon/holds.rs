//! Which streams are held back, disabled or quarantined, and since when: in a small file beside the
//! journal, so that it outlives the daemon and the retention of events.

use std::{collections::BTreeMap, io, time::SystemTime};

use serde::{Deserialize, Serialize};

use crate::{
    event::rfc3339,
    frame::{Code, State},
    journal::side::{Aside, Side},
    source::{SourceError, supervise::Leave},
};

/// Why a stream is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Why {
    /// An operator has disabled it.
    Disabled,
    /// It has crashed the daemon too often.
    Quarantined,
}

impl Why {
    pub(super) fn name(self) -> &'static str {
        match self {
            Why::Disabled => State::Disabled.name(),
            Why::Quarantined => State::Quarantined.name(),
        }
    }
}

/// One stream that is held back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hold {
    pub(super) why: Why,
    /// RFC 3339.
    since: String,
    /// What there is to say about it; may be empty.
    detail: String,
    /// The digest of the plan that it is quarantined for. `None` iff it is disabled, or an older
    /// version wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<String>,
}

impl Hold {
    pub(super) fn disabled() -> Hold {
        let since = rfc3339(SystemTime::now());
        Hold { why: Why::Disabled, since, detail: String::new(), plan: None }
    }

    /// `plan`: the digest of what is not to be opened.
    pub(super) fn quarantined(detail: String, plan: String) -> Hold {
        let since = rfc3339(SystemTime::now());
        Hold { why: Why::Quarantined, since, detail, plan: Some(plan) }
    }

    /// Whether it was made for something else than is configured now: what crashed may not be there
    /// any more.
    pub(super) fn is_of_another(&self, plan: &str) -> bool {
        self.why == Why::Quarantined && self.plan.as_ref().is_some_and(|it| it != plan)
    }

    /// What is said last of its stream.
    pub(super) fn leave(&self) -> Leave {
        match self.why {
            Why::Disabled => Leave { state: State::Disabled, error: None },
            Why::Quarantined => Leave {
                state: State::Quarantined,
                error: Some(SourceError { code: Code::Error, detail: self.detail.clone() }),
            },
        }
    }
}

/// All streams that are held back.
pub(super) struct Holds {
    side: Side,
    by_id: BTreeMap<String, Hold>,
}

impl Holds {
    /// Reads what is beside the journal. A file that is no such list is moved aside, and no stream is
    /// held back then.
    ///
    /// # Errors
    /// It is there and cannot be read: streams would be opened that an operator has disabled.
    pub(super) fn open(side: Side) -> io::Result<Holds> {
        let text = side.read()?.unwrap_or_else(|| b"{}".to_vec());
        let by_id = match serde_json::from_slice(&text) {
            Ok(by_id) => by_id,
            Err(error) => {
                damaged(&side, &error);
                BTreeMap::new()
            }
        };
        let holds = Holds { side, by_id };
        if !holds.side.is_there() {
            // Also if nothing is held: the next start must not take the list of another journal that an
            // earlier version has left, nor that one's old list again.
            noted(holds.save());
        }
        Ok(holds)
    }

    pub(super) fn get(&self, stream: &str) -> Option<&Hold> {
        self.by_id.get(stream)
    }

    /// Holds a stream back.
    ///
    /// # Errors
    /// It is held back, but a restart would open it again.
    pub(super) fn put(&mut self, stream: &str, hold: Hold) -> io::Result<()> {
        self.by_id.insert(stream.to_owned(), hold);
        self.save()
    }

    /// Takes back what was done to a stream and could not be written down. `before`: what it was.
    pub(super) fn undo(&mut self, stream: &str, before: Option<Hold>) {
        match before {
            Some(hold) => self.by_id.insert(stream.to_owned(), hold),
            None => self.by_id.remove(stream),
        };
        // What was refused may be on the disk all the same, if only what came after it has failed. That
        // nothing can be written is told to whoever has given the order.
        self.save().ok();
    }

    /// Holds a stream back no more.
    ///
    /// # Errors
    /// It is so, but a restart would hold it back again.
    pub(super) fn lift(&mut self, stream: &str) -> io::Result<()> {
        match self.by_id.remove(stream) {
            Some(_) => self.save(),
            None => Ok(()),
        }
    }

    /// Notes what the quarantines of an older version are for: it did not write that down.
    ///
    /// # Errors
    /// It is known in this run only.
    pub(super) fn complete(&mut self, plan: impl Fn(&str) -> Option<String>) -> io::Result<()> {
        let mut changed = false;
        for (id, hold) in &mut self.by_id {
            if hold.why == Why::Quarantined && hold.plan.is_none() {
                hold.plan = plan(id);
                changed = true;
            }
        }
        if changed { self.save() } else { Ok(()) }
    }

    /// Forgets the streams that are not in the configuration any more.
    ///
    /// # Errors
    /// It is so, but a restart would know them again.
    pub(super) fn keep(&mut self, configured: impl Fn(&str) -> bool) -> io::Result<()> {
        let before = self.by_id.len();
        self.by_id.retain(|id, _| configured(id));
        if self.by_id.len() == before { Ok(()) } else { self.save() }
    }

    fn save(&self) -> io::Result<()> {
        self.side.write(serde_json::to_string_pretty(&self.by_id)?.as_bytes())
    }
}

/// Says that the list is damaged, and moves it aside.
fn damaged(side: &Side, error: &serde_json::Error) {
    let what = "the list of disabled streams is damaged: all are opened";
    match side.set_aside() {
        Ok(Aside { file, moved_to: Some(moved_to) }) => {
            let (file, moved_to) = (file.display(), moved_to.display());
            tracing::error!(%error, %file, %moved_to, "{what}");
        }
        Ok(Aside { file, moved_to: None }) => {
            let file = file.display();
            tracing::error!(%error, %file, "{what}; an earlier version has written it, and it is left");
        }
        Err(failed) => {
            let (file, not_moved) = (side.path().display(), failed);
            tracing::error!(%error, %file, %not_moved, "{what}");
        }
    }
}

/// Says that something holds for this run only. The list is a record, and a full disk must not keep
/// the daemon from running.
pub(super) fn noted(done: io::Result<()>) {
    if let Err(error) = done {
        tracing::error!(%error, "the list of held streams cannot be written: the next start goes by the old one");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::journal::side::HELD;

    fn open(journal: &Path) -> io::Result<Holds> {
        Holds::open(Side::new(journal, HELD, true))
    }

    #[test]
    fn what_is_held_outlives_the_daemon_until_it_is_lifted() {
        let folder = tempfile::tempdir().unwrap();
        let journal = folder.path().join("journal.db");
        let mut it = open(&journal).unwrap();
        it.put("front", Hold::disabled()).unwrap();
        it.put("yard", Hold::quarantined("crashed".to_owned(), "1f".to_owned())).unwrap();
        let mut again = open(&journal).unwrap();
        assert_eq!(again.by_id, it.by_id);
        assert_eq!(again.get("front").unwrap().leave().state, State::Disabled);
        let yard = again.get("yard").unwrap().leave();
        assert_eq!((yard.state, &*yard.error.unwrap().detail), (State::Quarantined, "crashed"));
        again.keep(|id| id != "yard").unwrap();
        assert_eq!(open(&journal).unwrap().by_id.keys().collect::<Vec<_>>(), ["front"]);
    }

    #[test]
    fn a_quarantine_is_for_one_plan_and_a_disable_for_any() {
        let folder = tempfile::tempdir().unwrap();
        let journal = folder.path().join("journal.db");
        let disabled = Hold::disabled();
        assert!(!disabled.is_of_another("1f"));
        let old = r#"{"yard": {"why": "quarantined", "since": "", "detail": "crashed"}}"#;
        fs::write(folder.path().join("journal.held"), old).unwrap();
        let mut it = open(&journal).unwrap();
        assert!(!it.get("yard").unwrap().is_of_another("1f"), "an older version did not say");
        it.complete(|id| (id == "yard").then(|| "1f".to_owned())).unwrap();
        let again = open(&journal).unwrap();
        let yard = again.get("yard").unwrap();
        assert_eq!([yard.is_of_another("1f"), yard.is_of_another("2f")], [false, true]);
    }

    #[test]
    fn a_damaged_list_is_moved_aside() {
        let folder = tempfile::tempdir().unwrap();
        let journal = folder.path().join("journal.db");
        for damaged in [&b"{\"front\": 1"[..], b"\xff"] {
            fs::write(folder.path().join("journal.held"), damaged).unwrap();
            assert!(open(&journal).unwrap().by_id.is_empty());
            let aside = fs::read(folder.path().join("journal.held.damaged")).unwrap();
            assert_eq!(aside, damaged);
            assert_eq!(fs::read(folder.path().join("journal.held")).unwrap(), b"{}");
        }
    }

    #[test]
    fn a_new_journal_never_takes_the_list_that_an_earlier_one_has_left() {
        let folder = tempfile::tempdir().unwrap();
        let text = r#"{"front": {"why": "disabled", "since": "", "detail": ""}}"#;
        fs::write(folder.path().join("site.held"), text).unwrap();
        let journal = folder.path().join("site.b");
        for known in [false, true] {
            let it = Holds::open(Side::new(&journal, HELD, known)).unwrap();
            assert!(it.by_id.is_empty(), "known: {known}");
        }
        fs::write(folder.path().join("site.b.held"), "{").unwrap();
        for start in 1..3 {
            assert!(open(&journal).unwrap().by_id.is_empty(), "start {start}, damaged before");
        }
    }

    #[test]
    fn an_earlier_version_s_list_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let journals = ["site.a", "site.b"].map(|it| folder.path().join(it));
        let text = r#"{"front": {"why": "disabled", "since": "", "detail": ""}}"#;
        for old in [text, "{"] {
            fs::write(folder.path().join("site.held"), old).unwrap();
            for journal in &journals {
                let mut it = open(journal).unwrap();
                assert_eq!(it.get("front").is_some(), old == text);
                it.lift("front").unwrap();
                assert!(open(journal).unwrap().by_id.is_empty(), "read again");
            }
            assert_eq!(fs::read_to_string(folder.path().join("site.held")).unwrap(), old);
            for journal in &journals {
                fs::remove_file(Side::new(journal, HELD, true).path()).unwrap();
            }
        }
    }
}
