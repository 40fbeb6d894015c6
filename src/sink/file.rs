//! Events into a file, one JSON object per line, that is moved aside when it has grown.
//!
//! `events.ndjson` is the newest, `events.ndjson.1` the one before, and so on. A line is never
//! split over two files, and no line is ever continued: what a crash left half written is cut off
//! when the file is opened, what a full disk left half written when the write fails.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use crate::sink::settings::Rotation;

/// Lines are handed to the operating system when so much of them has come together.
const BUFFER: usize = 64 << 10;

/// A file of lines that is moved aside when it has grown.
#[derive(Debug)]
pub struct RotatingFile {
    path: PathBuf,
    rotation: Rotation,
    file: File,
    /// Whole lines that the operating system does not have yet.
    buffer: Vec<u8>,
    /// Bytes of the file at the last [`RotatingFile::flush`]: whole lines, and all of them wanted.
    flushed: u64,
    /// Bytes of the file once the buffer is in it.
    written: u64,
}

impl RotatingFile {
    /// Opens the file to append to, or makes it, and its folder. What lies behind its last line end
    /// was left half written by a crash and is cut off.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(path: &Path, rotation: Rotation) -> io::Result<RotatingFile> {
        if let Some(parent) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            fs::create_dir_all(parent)?;
        }
        let (file, length) = open(path)?;
        let (path, buffer) = (path.to_owned(), Vec::new());
        Ok(RotatingFile { path, rotation, file, buffer, flushed: length, written: length })
    }

    /// Appends one line; `line` has no line end itself.
    ///
    /// # Errors
    /// What the file system says. All lines since the last flush are then taken out again, so write
    /// them again; those in a file that was moved aside meanwhile are there twice, and readers know
    /// a repeated event by its id.
    pub fn write_line(&mut self, line: &str) -> io::Result<()> {
        let bytes = line.len() as u64 + 1;
        if 0 < self.written && self.rotation.bytes < self.written + bytes {
            self.rotate()?;
        }
        self.buffer.extend_from_slice(line.as_bytes());
        self.buffer.push(b'\n');
        self.written += bytes;
        if BUFFER <= self.buffer.len() {
            self.write_out()?;
        }
        Ok(())
    }

    /// Hands everything to the operating system, and waits for the disk if configured to.
    ///
    /// # Errors
    /// As [`RotatingFile::write_line`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.write_out()?;
        if self.rotation.sync
            && let Err(error) = self.file.sync_data()
        {
            self.take_back();
            return Err(error);
        }
        self.flushed = self.written;
        Ok(())
    }

    fn write_out(&mut self) -> io::Result<()> {
        let written = self.file.write_all(&self.buffer);
        self.buffer.clear();
        if written.is_err() {
            self.take_back();
        }
        written
    }

    /// Takes out what was written since the last flush.
    fn take_back(&mut self) {
        self.buffer.clear();
        self.written = self.flushed;
        if let Err(error) = self.file.set_len(self.flushed) {
            // The next opening cuts off what is no whole line.
            tracing::warn!(file = %self.path.display(), %error, "cannot cut off a half-written line");
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.flush()?;
        for it in (1..self.rotation.keep).rev() {
            match fs::rename(self.aside(it), self.aside(it + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match self.rotation.keep {
            0 => fs::remove_file(&self.path)?,
            _ => fs::rename(&self.path, self.aside(1))?,
        }
        (self.file, self.written) = open(&self.path)?;
        self.flushed = self.written;
        Ok(())
    }

    fn aside(&self, number: u32) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    }
}

/// The file, and its length without what is half written at its end.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    let metadata = file.metadata()?;
    // A pipe or a device has no end that could be looked at.
    if !metadata.is_file() || metadata.len() == 0 {
        return Ok((file, 0));
    }
    let (length, whole) = (metadata.len(), whole_lines(path, metadata.len())?);
    if whole < length {
        let cut_bytes = length - whole;
        tracing::warn!(file = %path.display(), cut_bytes, "a half-written line was cut off");
        file.set_len(whole)?;
    }
    Ok((file, whole))
}

/// Bytes up to the last line end, that one included.
fn whole_lines(path: &Path, length: u64) -> io::Result<u64> {
    let file = File::open(path)?;
    let mut end = length;
    let mut part = vec![0; BUFFER];
    while 0 < end {
        let start = end.saturating_sub(BUFFER as u64);
        let part = &mut part[..(end - start) as usize];
        file.read_exact_at(part, start)?;
        if let Some(at) = part.iter().rposition(|it| *it == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<String> {
        fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_grown_file_moves_aside_whole_lines_and_old_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out/events.ndjson");
        let rotation = Rotation { bytes: 20, keep: 2, sync: true };
        let mut file = RotatingFile::open(&path, rotation).unwrap();
        for it in 0..10 {
            file.write_line(&format!("line {it:04}")).unwrap();
            if it == 4 {
                file.flush().unwrap();
                file = RotatingFile::open(&path, rotation).unwrap();
            }
        }
        file.flush().unwrap();
        assert_eq!(lines(&path), ["line 0008", "line 0009"]);
        assert_eq!(lines(&file.aside(1)), ["line 0006", "line 0007"]);
        assert_eq!(lines(&file.aside(2)), ["line 0004", "line 0005"]);
        assert!(!file.aside(3).exists());
    }

    #[test]
    fn a_line_longer_than_the_limit_gets_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.ndjson");
        let rotation = Rotation { bytes: 4, keep: 1, sync: false };
        let mut file = RotatingFile::open(&path, rotation).unwrap();
        for it in ["a long line", "another long line", "b"] {
            file.write_line(it).unwrap();
        }
        file.flush().unwrap();
        assert_eq!(lines(&path), ["b"]);
        assert_eq!(lines(&file.aside(1)), ["another long line"]);
    }

    #[test]
    fn with_nothing_to_keep_the_file_starts_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.ndjson");
        let rotation = Rotation { bytes: 10, keep: 0, sync: false };
        let mut file = RotatingFile::open(&path, rotation).unwrap();
        for it in 0..3 {
            file.write_line(&format!("line {it}")).unwrap();
        }
        file.flush().unwrap();
        assert_eq!(lines(&path), ["line 2"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_crash_left_half_written_is_cut_off_and_no_line_is_glued_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.ndjson");
        let rotation = Rotation { bytes: 1 << 20, keep: 1, sync: false };
        let half = "x".repeat(100_000);
        for (left, expected) in [
            ("line 1\nline 2\n{\"half".to_owned(), &["line 1", "line 2", "new"][..]),
            (format!("line 1\n{half}"), &["line 1", "new"]),
            (half.clone(), &["new"]),
            ("line 1\n".to_owned(), &["line 1", "new"]),
            (String::new(), &["new"]),
        ] {
            fs::write(&path, left).unwrap();
            let mut file = RotatingFile::open(&path, rotation).unwrap();
            file.write_line("new").unwrap();
            file.flush().unwrap();
            assert_eq!(lines(&path), expected);
        }
    }
}
