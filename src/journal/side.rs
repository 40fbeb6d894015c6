//! The small files beside a journal that are named after it: who is held back, what crashed, the socket.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
};

use crate::journal::beside;

/// The list of streams that are held back.
pub const HELD: &str = "held";
/// What crashed.
pub const CRASHES: &str = "crashes";
/// Where orders are taken.
pub const SOCKET: &str = "sock";
/// All of them.
pub(super) const KINDS: [&str; 3] = [HELD, CRASHES, SOCKET];

/// The file of a kind beside a journal: the whole name of the journal and the kind, so that the files
/// of `site.a` are not those of `site.b`. Only `journal.db`, the usual name, goes without its ending.
pub fn path_of(journal: &Path, kind: &str) -> PathBuf {
    let name = match journal.file_name().and_then(|it| it.to_str()) {
        Some("journal.db") => Path::new("journal"),
        // The two change places, or they would meet.
        Some("journal") => Path::new("journal.db"),
        _ => journal.file_name().map_or(Path::new(""), Path::new),
    };
    beside(&journal.with_file_name(name), &format!(".{kind}"))
}

/// Whether a daemon has written to this journal before. To be asked before it is opened.
pub fn is_known(journal: &Path) -> bool {
    beside(journal, ".lock").exists()
}

/// One of these files, which is read and written as a whole.
#[derive(Debug)]
pub struct Side {
    path: PathBuf,
    /// Where earlier versions had it. `None` iff that is the same, or the journal is new.
    before: Option<PathBuf>,
    /// Whose owner is that of the files beside it.
    journal: PathBuf,
}

impl Side {
    /// The file of a kind. `known`: see [`is_known`].
    pub fn new(journal: &Path, kind: &str, known: bool) -> Side {
        let (path, before) = (path_of(journal, kind), journal.with_extension(kind));
        let before = (known && before != path).then_some(before);
        Side { path, before, journal: journal.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it, or, as long as it is not there, in the file of earlier versions. That one is left
    /// alone: it may belong to another journal too. `None` if there is neither.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn read(&self) -> io::Result<Option<Vec<u8>>> {
        for path in [Some(&self.path), self.before.as_ref()].into_iter().flatten() {
            match fs::read(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                text => return text.map(Some),
            }
        }
        Ok(None)
    }

    /// Whether it is there. What is to say nothing has to be written too, or the next start takes what
    /// an earlier version has left for it.
    pub fn is_there(&self) -> bool {
        self.path.exists()
    }

    /// Writes all of it: whoever reads meets the old text or the new one, also after a power cut.
    ///
    /// # Errors
    /// What the file system says. What is there is the old text, or, if only the folder could not be
    /// brought to the disk, the new one.
    pub fn write(&self, text: &[u8]) -> io::Result<()> {
        let new = beside(&self.path, ".new");
        // Nobody else has to know what it says of the configuration.
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        self.give_to_owner(&file)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        let folder = self.path.parent().filter(|it| !it.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// After one run as root the service's user could not read it any more.
    fn give_to_owner(&self, file: &File) -> io::Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        match fs::metadata(&self.journal) {
            Ok(it) => fchown(file, Some(it.uid()), Some(it.gid())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves what is read away, as something that cannot be used. An earlier version's file stays: it
    /// may belong to another journal too.
    ///
    /// # Errors
    /// What the file system says.
    pub fn set_aside(&self) -> io::Result<Aside> {
        let moved_to = beside(&self.path, ".damaged");
        match (fs::rename(&self.path, &moved_to), &self.before) {
            (Err(error), Some(before)) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Aside { file: before.clone(), moved_to: None })
            }
            (done, _) => done.map(|()| Aside { file: self.path.clone(), moved_to: Some(moved_to) }),
        }
    }
}

/// What became of a file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// Which one it was.
    pub file: PathBuf,
    /// Where it is now. `None` iff it was left where it is.
    pub moved_to: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_journals_share_a_file_and_the_usual_name_keeps_its_own() {
        let names =
            ["journal.db", "journal", "site.a", "site.b", "site", "site.db", "a.journal.db"];
        let paths = names.map(|it| path_of(&Path::new("data").join(it), "held"));
        let shown = paths.clone().map(|it| it.display().to_string());
        let expected = [
            "data/journal.held",
            "data/journal.db.held",
            "data/site.a.held",
            "data/site.b.held",
            "data/site.held",
            "data/site.db.held",
            "data/a.journal.db.held",
        ];
        assert_eq!(shown, expected);
        assert_eq!(path_of(Path::new("journal.db"), "sock"), Path::new("journal.sock"));
    }

    #[test]
    fn what_an_earlier_version_wrote_is_read_until_something_is_written_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("site.held"), "old").unwrap();
        let side = |name: &str, known| Side::new(&at(name), "held", known);
        for name in ["site.a", "site.b", "site.db"] {
            assert_eq!(side(name, false).read().unwrap(), None, "a new journal has no past");
            let it = side(name, true);
            assert!(!it.is_there());
            assert_eq!(it.read().unwrap().as_deref(), Some(&b"old"[..]), "{name}");
            it.write(name.as_bytes()).unwrap();
            assert!(it.is_there());
            assert_eq!(it.read().unwrap().as_deref(), Some(name.as_bytes()));
        }
        assert_eq!(fs::read(at("site.held")).unwrap(), b"old");
        assert_eq!(side("other", true).read().unwrap(), None);
    }

    #[test]
    fn what_root_writes_belongs_to_the_journal_s_owner() {
        let folder = tempfile::tempdir().unwrap();
        let journal = folder.path().join("journal.db");
        fs::write(&journal, "").unwrap();
        // Anybody else may give a file away to himself only, and writes as himself.
        let root = rustix::process::geteuid().is_root();
        let own = fs::metadata(&journal).unwrap();
        let (user, group) = if root { (4321, 1234) } else { (own.uid(), own.gid()) };
        std::os::unix::fs::chown(&journal, Some(user), Some(group)).unwrap();
        let side = Side::new(&journal, "held", true);
        side.write(b"{}").unwrap();
        let it = fs::metadata(side.path()).unwrap();
        assert_eq!((it.uid(), it.gid(), it.mode() & 0o777), (user, group, 0o600));
    }

    #[test]
    fn what_cannot_be_used_is_moved_unless_an_earlier_version_has_left_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("site.held"), "old").unwrap();
        let side = Side::new(&at("site.a"), "held", true);
        let left = Aside { file: at("site.held"), moved_to: None };
        assert_eq!(side.set_aside().unwrap(), left);
        side.write(b"new").unwrap();
        let moved = Aside { file: at("site.a.held"), moved_to: Some(at("site.a.held.damaged")) };
        assert_eq!(side.set_aside().unwrap(), moved);
        assert_eq!(fs::read(at("site.a.held.damaged")).unwrap(), b"new");
        let gone = Side::new(&at("site.b"), "held", false).set_aside();
        assert_eq!(gone.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
