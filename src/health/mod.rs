//! Whether a camera shows anything worth a label: frozen, dark, uniform, smeared, corrupt. Pure.
//! And whether too many of its pictures give way to newer ones: see [`overload`].
//!
//! [`measure`] says what one model input looks like, [`track`] what that means for its stream over
//! time. [`watch`] puts the two between a stream's frames and its events.

pub mod measure;
pub mod overload;
#[cfg(test)]
mod tests;
pub mod track;
pub mod watch;

use std::time::{Duration, SystemTime};

use measure::Look;
use overload::Rates;

/// What can be wrong with pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Flag {
    /// The picture does not change, not even by noise.
    Frozen,
    /// Almost black, all of it.
    Dark,
    /// One colour, all of it.
    Uniform,
    /// Its lower part repeats one row, or is the grey of a decoder that had nothing to decode.
    Smeared,
    /// The decoder marked it as broken, or something before it was lost.
    Corrupt,
    /// Nothing is wrong with the picture, but many others gave way to it: there is too much to do.
    Degraded,
}

impl Flag {
    /// Every flag.
    pub const ALL: [Flag; 6] =
        [Flag::Frozen, Flag::Dark, Flag::Uniform, Flag::Smeared, Flag::Corrupt, Flag::Degraded];

    /// The name in events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Flag::Frozen => "frozen",
            Flag::Dark => "dark",
            Flag::Uniform => "uniform",
            Flag::Smeared => "smeared",
            Flag::Corrupt => "corrupt",
            Flag::Degraded => "degraded",
        }
    }
}

/// What holds for a stream, each since when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    since: [Option<SystemTime>; Flag::ALL.len()],
    /// `Some` iff it is degraded.
    rates: Option<Rates>,
}

impl Flags {
    /// Whether it holds.
    pub fn has(&self, flag: Flag) -> bool {
        self.since(flag).is_some()
    }

    /// Since when it holds, if it does.
    pub fn since(&self, flag: Flag) -> Option<SystemTime> {
        self.since[flag as usize]
    }

    /// How many labels it gets and wants, if it is degraded.
    pub fn rates(&self) -> Option<Rates> {
        self.rates
    }

    /// Those that hold, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (Flag, SystemTime)> + '_ {
        Flag::ALL.into_iter().zip(self.since).filter_map(|(flag, since)| Some((flag, since?)))
    }

    fn set(&mut self, flag: Flag, since: Option<SystemTime>) {
        self.since[flag as usize] = since;
    }
}

/// What is known about one picture. Until preprocess has seen it, only whether it is corrupt.
#[derive(Clone, Debug, Default)]
pub struct Quality {
    /// What was measured.
    pub look: Option<Look>,
    /// What is wrong with it.
    pub flags: Vec<Flag>,
}

/// What is configured about the health of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long a picture stays the same before it counts as frozen; `None`: never.
    pub frozen_after: Option<Duration>,
    /// Whether bad pictures are labelled like others.
    pub label_bad_pictures: bool,
    /// Whether those are that the decoder marked as broken.
    pub label_corrupt_pictures: bool,
    /// Time is what the pictures' PTS say, not when they arrive: for what is read at any speed.
    pub by_pts: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            frozen_after: Some(Duration::from_secs(30)),
            label_bad_pictures: true,
            label_corrupt_pictures: false,
            by_pts: false,
        }
    }
}
