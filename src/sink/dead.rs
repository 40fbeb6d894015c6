//! Where messages go that a broker will never take: a file beside the journal, one per sink.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::sink::{broker::Message, file::RotatingFile, settings::Rotation};

/// Older files of the same sink are kept, up to 1 GiB in all.
const ROTATION: Rotation = Rotation { bytes: 100 << 20, keep: 9, sync: true };

/// The dead-letter file of one sink. It is made with the first message.
#[derive(Debug)]
pub struct DeadLetters {
    path: PathBuf,
    file: Option<RotatingFile>,
}

impl DeadLetters {
    /// Of a sink: `<journal>.<sink>.dead.ndjson`.
    pub fn new(journal: &Path, sink: &str) -> DeadLetters {
        let mut name = journal.as_os_str().to_owned();
        name.push(format!(".{sink}.dead.ndjson"));
        DeadLetters { path: PathBuf::from(name), file: None }
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the event, and waits for the disk.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&mut self, message: &Message) -> anyhow::Result<()> {
        let at = || format!("dead-letter file {}", self.path.display());
        if self.file.is_none() {
            self.file = Some(RotatingFile::open(&self.path, ROTATION).with_context(at)?);
        }
        let file = self.file.as_mut().expect("it was just opened");
        let written = file.write_line(&message.json).and_then(|()| file.flush());
        if written.is_err() {
            // The next opening cuts off what could not be cut off now.
            self.file = None;
        }
        written.with_context(at)
    }
}
