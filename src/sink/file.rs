//! Events into a file, one JSON object per line, that is moved aside when it has grown.
//!
//! `events.ndjson` is the newest, `events.ndjson.1` the one before, and so on. A line is never
//! split over two files.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::sink::settings::Rotation;

/// A file of lines that is moved aside when it has grown.
#[derive(Debug)]
pub struct RotatingFile {
    path: PathBuf,
    rotation: Rotation,
    file: BufWriter<File>,
    written: u64,
}

impl RotatingFile {
    /// Opens the file to append to, or makes it, and its folder.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(path: &Path, rotation: Rotation) -> io::Result<RotatingFile> {
        if let Some(parent) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            fs::create_dir_all(parent)?;
        }
        let (file, written) = open(path)?;
        Ok(RotatingFile { path: path.to_owned(), rotation, file, written })
    }

    /// Appends one line; `line` has no line end itself.
    ///
    /// # Errors
    /// What the file system says. The line may then be there in part, so write it again: readers
    /// know a repeated event by its id.
    pub fn write_line(&mut self, line: &str) -> io::Result<()> {
        let bytes = line.len() as u64 + 1;
        if 0 < self.written && self.rotation.bytes < self.written + bytes {
            self.rotate()?;
        }
        self.file.write_all(line.as_bytes())?;
        self.file.write_all(b"\n")?;
        self.written += bytes;
        Ok(())
    }

    /// Hands everything to the operating system, and waits for the disk if configured to.
    ///
    /// # Errors
    /// What the file system says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()?;
        if self.rotation.sync {
            self.file.get_ref().sync_data()?;
        }
        Ok(())
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
        Ok(())
    }

    fn aside(&self, number: u32) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    }
}

fn open(path: &Path) -> io::Result<(BufWriter<File>, u64)> {
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    let written = file.metadata()?.len();
    Ok((BufWriter::new(file), written))
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
}
