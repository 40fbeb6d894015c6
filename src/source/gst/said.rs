//! What GStreamer says in its log about one connection: the last lines, for when it fails.
//!
//! GStreamer has one log for the whole process. A line names the element or pad that it is about by
//! address, and each connection puts the addresses of its own into a table as they are added to its
//! pipeline: one look-up, where a walk over the parents would touch objects that may be on their
//! way out. A line about no object, such as why a host was not reached, belongs to whoever has the
//! next line of the same thread, if that comes at once. Nothing is done until a warning comes.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    env,
    sync::{Arc, LazyLock, Mutex, MutexGuard, Once, PoisonError, RwLock},
    time::{Duration, Instant},
};

use gstreamer::{
    self as gst, DebugLevel,
    log::{DebugMessage, LoggedObject},
    prelude::*,
};
use tracing::info;

use crate::source::gst::{damage, redact::Redactor};

/// Lines that are kept of each connection.
const LINES_MAX: usize = 20;

/// Longest line that is passed on, in characters.
const LINE_MAX: usize = 300;

/// Longest line that is looked at, in bytes. To cut a line before its secrets are out could leave
/// a part of one.
const RAW_MAX: usize = 4 << 10;

/// A line about no object waits so long for one of the same thread that is about one, and so many
/// of them do.
const WAIT_MAX: Duration = Duration::from_secs(1);
const WAITING_MAX: usize = 3;

thread_local! {
    static WAITING: RefCell<Vec<(Instant, String)>> = const { RefCell::new(Vec::new()) };
}

/// Whose element or pad lies at an address.
static OWNERS: LazyLock<Mutex<HashMap<usize, Arc<Said>>>> = LazyLock::new(Mutex::default);

/// The secrets of every stream that was ever opened: for lines of which it is not sure whose they
/// are.
static SECRETS: RwLock<Vec<Redactor>> = RwLock::new(Vec::new());

fn owners() -> MutexGuard<'static, HashMap<usize, Arc<Said>>> {
    OWNERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins to listen to GStreamer, which must be initialised, in place of its own output.
///
/// With `GST_DEBUG` the lines that it asks for go to our log, without the secrets of any stream.
pub fn listen(redactor: &Redactor) {
    static ONCE: Once = Once::new();
    let mut secrets = SECRETS.write().unwrap_or_else(PoisonError::into_inner);
    if !secrets.contains(redactor) {
        secrets.push(redactor.clone());
    }
    drop(secrets);
    ONCE.call_once(|| {
        if gst::log::get_default_threshold() < DebugLevel::Warning {
            gst::log::set_default_threshold(DebugLevel::Warning);
        }
        gst::log::remove_default_log_function();
        let asked = env::var_os("GST_DEBUG");
        let shown = asked.as_ref().is_some_and(|it| !it.is_empty());
        damage::listen(asked.as_ref().and_then(|it| it.to_str()));
        gst::log::add_log_function(move |category, level, _, _, _, object, message| {
            hear(shown, (category, level), object, message);
        });
    });
}

fn hear(
    shown: bool,
    (category, level): (gst::DebugCategory, DebugLevel),
    object: Option<&LoggedObject>,
    message: &DebugMessage,
) {
    damage::hear(category.name(), &message.get().unwrap_or_default());
    let kept = level <= DebugLevel::Warning;
    let owner = object.filter(|_| kept).and_then(|it| {
        let owners = owners();
        owners.get(&(it.as_ptr() as usize)).cloned()
    });
    let free = kept && object.is_none();
    if owner.is_none() && !free && !shown {
        return;
    }
    let object = object.map(|it| format!(" {it}")).unwrap_or_default();
    let message = message.get().unwrap_or_default();
    let line = format!("{} {}{object}: {message}", level.name().trim_end(), category.name());
    if shown {
        info!(target: "gstreamer", "{}", hidden(&line));
    }
    if let Some(owner) = owner {
        let now = Instant::now();
        for (at, line) in waiting(std::mem::take).unwrap_or_default() {
            if now.saturating_duration_since(at) < WAIT_MAX {
                owner.add(hidden(&line));
            }
        }
        owner.add(line);
    } else if free {
        waiting(|it| {
            if it.len() == WAITING_MAX {
                it.remove(0);
            }
            it.push((Instant::now(), line));
        });
    }
}

/// This thread's waiting lines. `None` iff the thread is ending.
fn waiting<T>(f: impl FnOnce(&mut Vec<(Instant, String)>) -> T) -> Option<T> {
    WAITING.try_with(|it| it.try_borrow_mut().ok().map(|mut it| f(&mut it))).ok().flatten()
}

/// `line` without the secrets of any stream.
fn hidden(line: &str) -> String {
    let secrets = SECRETS.read().unwrap_or_else(PoisonError::into_inner);
    secrets.iter().fold(line.to_owned(), |line, it| it.hide(&line))
}

/// What was said about one connection.
#[derive(Debug)]
pub struct Said {
    redactor: Redactor,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Each with how many times it was said in a row. As they came: with secrets.
    lines: VecDeque<(String, u64)>,
    closed: bool,
}

impl Said {
    /// Nothing yet.
    pub fn new(redactor: Redactor) -> Said {
        Said { redactor, kept: Mutex::default() }
    }

    /// What is taken out of the lines.
    pub fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what is said about `pipeline` and all that will be in it.
    pub fn about(self: &Arc<Said>, pipeline: &gst::Pipeline) {
        self.own(pipeline.upcast_ref::<gst::Object>());
        let said = self.clone();
        pipeline.connect_deep_element_added(move |_, _, element| said.own_element(element));
        pipeline.connect_deep_element_removed(|_, _, element| {
            let pads = element.pads();
            let mut owners = owners();
            owners.remove(&address(element.upcast_ref()));
            pads.iter().for_each(|it| drop(owners.remove(&address(it.upcast_ref()))));
        });
    }

    fn own_element(self: &Arc<Said>, element: &gst::Element) {
        self.own(element.upcast_ref());
        element.pads().iter().for_each(|it| self.own(it.upcast_ref()));
        let said = self.clone();
        element.connect_pad_added(move |_, pad| said.own(pad.upcast_ref()));
        element.connect_pad_removed(|_, pad| drop(owners().remove(&address(pad.upcast_ref()))));
    }

    fn own(self: &Arc<Said>, object: &gst::Object) {
        // Both locks, or an element that is added while the connection ends would stay.
        let mut owners = owners();
        if !self.kept().closed {
            owners.insert(address(object), self.clone());
        }
    }

    fn add(&self, line: String) {
        let mut kept = self.kept();
        if kept.closed {
            return;
        }
        let line = match line.len() {
            0..=RAW_MAX => line,
            n => format!("a line of {n} bytes"),
        };
        if let Some(last) = kept.lines.back_mut().filter(|it| it.0 == line) {
            last.1 += 1;
            return;
        }
        if kept.lines.len() == LINES_MAX {
            kept.lines.pop_front();
        }
        kept.lines.push_back((line, 1));
    }

    /// Keeps nothing more; what there is stays.
    pub fn close(self: &Arc<Said>) {
        let mut owners = owners();
        let closed = std::mem::replace(&mut self.kept().closed, true);
        if !closed {
            owners.retain(|_, it| !Arc::ptr_eq(it, self));
        }
    }

    /// The last lines, oldest first, without secrets and control characters.
    pub fn lines(&self) -> Vec<String> {
        let line = |(text, times): &(String, u64)| match times {
            1 => self.redactor.line(text, LINE_MAX),
            n => format!("{} ({n} times)", self.redactor.line(text, LINE_MAX)),
        };
        self.kept().lines.iter().map(line).collect()
    }
}

fn address(object: &gst::Object) -> usize {
    object.as_ptr() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{secret::Secret, source::Spec};

    fn said() -> Arc<Said> {
        let spec = Spec { password: Some(Secret::new("canary")), ..Spec::parse("a.mp4").unwrap() };
        let redactor = Redactor::new(&spec);
        gst::init().unwrap();
        listen(&redactor);
        Arc::new(Said::new(redactor))
    }

    fn warn(object: &impl IsA<gst::glib::Object>, text: &str) {
        gst::error!(gst::CAT_DEFAULT, obj = object, "{text}");
    }

    #[test]
    fn a_line_goes_to_the_connection_whose_element_or_pad_it_is_about() {
        let (a, b) = (said(), said());
        let (one, two) = (gst::Pipeline::with_name("one"), gst::Pipeline::with_name("two"));
        a.about(&one);
        b.about(&two);
        let bin = gst::Bin::with_name("inner");
        let queue = gst::ElementFactory::make("queue").name("q").build().unwrap();
        bin.add(&queue).unwrap();
        one.add(&bin).unwrap();
        let tee = gst::ElementFactory::make("tee").name("t").build().unwrap();
        two.add(&tee).unwrap();
        let pad = tee.request_pad_simple("src_%u").unwrap();
        gst::error!(gst::CAT_DEFAULT, "why");
        warn(&queue, "bad\x1b canary");
        warn(&queue, "bad\x1b canary");
        warn(&queue.static_pad("sink").unwrap(), "worse");
        warn(&pad, "late pad");
        let of = |it: &Said| {
            let lines = it.lines();
            let tail = |it: &String| it.split_once("default").unwrap().1.trim().to_owned();
            lines.iter().map(tail).collect::<Vec<_>>()
        };
        assert_eq!(of(&a), [": why", "q: bad\\u{1b} *** (2 times)", "q:sink: worse"]);
        assert_eq!(of(&b), ["t:src_0: late pad"]);
        bin.remove(&queue).unwrap();
        warn(&queue, "not ours any more");
        a.close();
        warn(&bin, "after the end");
        one.add(&gst::ElementFactory::make("queue").build().unwrap()).unwrap();
        assert_eq!(of(&a).len(), 3);
        let mine = |it: &Arc<Said>| owners().values().filter(|of| Arc::ptr_eq(of, it)).count();
        assert_eq!(mine(&a), 0);
        b.close();
        assert_eq!(mine(&b), 0);
    }

    #[test]
    fn the_last_lines_are_kept_and_a_flood_takes_no_memory() {
        let said = said();
        for i in 0..10_000 {
            said.add(format!("line {i}"));
        }
        said.add("x".repeat(1 << 20));
        said.add("y".repeat(RAW_MAX));
        let lines = said.lines();
        assert_eq!((lines.len(), lines[0].as_str()), (LINES_MAX, "line 9982"));
        assert_eq!(lines[LINES_MAX - 2], "a line of 1048576 bytes");
        assert_eq!(lines[LINES_MAX - 1].chars().count(), LINE_MAX + 1);
    }
}
