//! Which stream the process died of: a decoder that crashes takes the daemon with it.
//!
//! Decoders run in threads of this process. Each thread of a stream is named after it, and a handler
//! of the deadly signals writes the name of the thread that got one into a file beside the journal.
//! What follows from that is decided by the next start, see [`log`]. Then the signal takes its course:
//! the process ends as without the handler, with a core if those are wanted.

pub mod log;
#[allow(unsafe_code, reason = "installs a signal handler")]
mod signal;

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    path::Path,
    sync::{LazyLock, Mutex, OnceLock, PoisonError},
};

use anyhow::Context as _;

/// Streams that can be told apart in one run of the daemon: more than may be configured at once.
const NAMES_MAX: usize = 4096;

/// What the names of a stream's threads start with, before the number of the stream.
const PREFIX: char = 'v';

/// The streams by their number. A signal handler may look into it: nothing in it ever waits.
static NAMES: [OnceLock<String>; NAMES_MAX] = [const { OnceLock::new() }; NAMES_MAX];

/// The numbers by stream. Numbers are never used again.
static NUMBERS: LazyLock<Mutex<HashMap<String, usize>>> = LazyLock::new(Mutex::default);

/// Writes down which stream's thread got a deadly signal, from now on and for as long as the process
/// lives, in `file`.
///
/// # Errors
/// The file cannot be opened, or the operating system refuses the handler.
pub fn watch(file: &Path) -> anyhow::Result<()> {
    let opened = OpenOptions::new().create(true).append(true).open(file);
    let opened = opened.with_context(|| format!("opening {}", file.display()))?;
    signal::install(opened).context("watching for crashes")
}

/// The name of a stream's threads, which the operating system cuts to 15 bytes: the number that the
/// stream is known by, then as much of its id as fits.
pub fn thread_name(stream: &str) -> String {
    let mut numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
    let next = numbers.len();
    let number = *numbers.entry(stream.to_owned()).or_insert(next);
    if let Some(place) = NAMES.get(number) {
        place.get_or_init(|| stream.to_owned());
    }
    let mut name = format!("{PREFIX}{number}:{stream}");
    name.truncate(15);
    name
}

/// The stream that a thread of this name belongs to. May be asked by a signal handler.
fn stream_of(thread: &[u8]) -> Option<&'static str> {
    let digits = thread.strip_prefix(&[PREFIX as u8])?;
    let end = digits.iter().position(|it| *it == b':')?;
    let number = str::from_utf8(&digits[..end]).ok()?.parse::<usize>().ok()?;
    NAMES.get(number)?.get().map(String::as_str)
}

/// Writes a line about a signal. Called by the signal handler: it takes no lock and no memory.
fn write(file: &File, signal: &str) {
    let mut name = [0; 16];
    let comm = rustix::fs::open(
        c"/proc/thread-self/comm",
        rustix::fs::OFlags::RDONLY,
        rustix::fs::Mode::empty(),
    );
    let length = comm.ok().and_then(|it| rustix::io::read(it, &mut name).ok()).unwrap_or(0);
    let stream = stream_of(name[..length].trim_ascii_end()).unwrap_or(log::NONE);
    let seconds = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
    let mut line = Line::default();
    line.number(seconds.unsigned_abs());
    for part in [" ", signal, " ", stream, "\n"] {
        line.text(part.as_bytes());
    }
    // There is nobody to tell, and the process is about to end.
    rustix::io::write(file, &line.bytes[..line.length]).ok();
}

/// A line that is put together without memory from the heap.
struct Line {
    bytes: [u8; 160],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line { bytes: [0; 160], length: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, number: u64) {
        let mut divisor = 10_u64.pow(number.checked_ilog10().unwrap_or(0));
        while 0 < divisor {
            self.text(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_known_by_the_number_in_its_name_however_long_its_stream_is() {
        let long = "a".repeat(63);
        let names = [&long, &format!("{}b", &long[..62]), "front"].map(thread_name);
        assert!(names.iter().all(|it| it.len() <= 15), "{names:?}");
        for (name, stream) in names.iter().zip([&*long, &format!("{}b", &long[..62]), "front"]) {
            assert_eq!(stream_of(name.as_bytes()), Some(stream));
            assert_eq!(thread_name(stream), *name, "the same each time");
        }
        for other in ["", "v", "v1", "v:", "vx:a", "v99999:a", "src-front", "journal"] {
            assert_eq!(stream_of(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn a_line_names_the_thread_that_writes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("crashes");
        let file = File::create(&path).unwrap();
        let body = {
            let file = file.try_clone().unwrap();
            move || {
                let name = thread_name("a-camera-with-a-long-name");
                rustix::thread::set_name(&std::ffi::CString::new(name).unwrap()).unwrap();
                write(&file, "SIGSEGV");
            }
        };
        std::thread::scope(|scope| scope.spawn(body).join()).unwrap();
        write(&file, "SIGABRT");
        let crashes = log::parse(&std::fs::read(&path).unwrap());
        let who: Vec<_> = crashes.iter().map(|it| (&*it.what, it.stream.as_deref())).collect();
        assert_eq!(who, [("SIGSEGV", Some("a-camera-with-a-long-name")), ("SIGABRT", None)]);
    }
}
