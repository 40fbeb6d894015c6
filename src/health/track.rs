//! What a stream's pictures say about it over time. Pure: time is what it is told.

use std::time::{Duration, Instant, SystemTime};

use super::{
    Flag, Flags, Settings,
    measure::{Degree, Look},
    overload::Overload,
};

/// What is wrong with pictures for this long is raised.
const RAISE_AFTER: Duration = Duration::from_secs(2);
/// What is right again for this long is cleared.
const CLEAR_AFTER: Duration = Duration::from_secs(1);
/// A stream has no corrupt pictures any more once it had none for this long.
const SOUND_AFTER: Duration = Duration::from_secs(5);
/// So many keyframes must have come since a picture changed last. An encoder that is short of bits
/// repeats the last picture bit by bit until its next keyframe, whatever the camera sees.
const KEYFRAMES: u64 = 3;
/// Some cameras send keyframes on request only. This long without one is enough.
const KEYFRAMES_WITHIN: Duration = Duration::from_secs(600);

/// When a picture was.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The epoch, which ends where PTS jump.
    pub epoch: u64,
    /// Presentation time.
    pub pts: Duration,
    /// When it arrived.
    pub arrived: Instant,
    /// The time that is published.
    pub time: SystemTime,
}

/// One picture of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// What it looks like.
    pub look: &'a Look,
    /// When it was.
    pub at: Moment,
    /// Keyframes that the stream has had; 0 if its source does not tell.
    pub keyframes: u64,
    /// Whether pictures before it were given up because the decoder marked them as broken.
    pub after_corrupt: bool,
    /// Pictures before it that gave way because there was too much to do.
    pub gave_way: u32,
}

/// The health of one stream.
#[derive(Clone, Debug)]
pub struct Tracker {
    settings: Settings,
    flags: Flags,
    /// The last picture's moment, and the stream's own time then.
    last: Option<(Moment, Duration)>,
    /// The picture that later ones are compared with.
    still: Option<Still>,
    /// Dark, uniform and smeared, in this order.
    held: [Held; 3],
    /// When a picture was given up last.
    corrupt: Option<Duration>,
    overload: Overload,
}

#[derive(Clone, Debug)]
struct Still {
    look: Look,
    since: (Duration, SystemTime),
    keyframes: u64,
}

/// How long one thing has been so.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    /// Since when every picture had it.
    yes: Option<(Duration, SystemTime)>,
    /// Since when none had.
    no: Option<Duration>,
}

impl Held {
    /// Since when the flag holds after the next picture.
    fn next(
        &mut self,
        degree: Degree,
        at: (Duration, SystemTime),
        flag: Option<SystemTime>,
    ) -> Option<SystemTime> {
        let (yes, no) = (self.yes.take(), self.no.take());
        match degree {
            Degree::Near => flag,
            Degree::Yes => {
                let since = yes.unwrap_or(at);
                self.yes = Some(since);
                flag.or((since.0 + RAISE_AFTER <= at.0).then_some(since.1))
            }
            Degree::No => {
                let since = no.unwrap_or(at.0);
                self.no = Some(since);
                flag.filter(|_| at.0 < since + CLEAR_AFTER)
            }
        }
    }
}

impl Tracker {
    /// A stream that nothing is known about.
    pub fn new(settings: Settings) -> Tracker {
        Tracker {
            settings,
            flags: Flags::default(),
            last: None,
            still: None,
            held: [Held::default(); 3],
            corrupt: None,
            overload: Overload::default(),
        }
    }

    /// What holds.
    pub fn flags(&self) -> Flags {
        self.flags
    }

    /// What is configured.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Forgets all: the stream has stopped.
    pub fn reset(&mut self) {
        *self = Tracker::new(self.settings);
    }

    /// Looks at the next picture; gives whether the flags have changed.
    pub fn see(&mut self, seen: &Seen<'_>) -> bool {
        let before = self.flags;
        let now = self.advance(seen.at);
        let at = (now, seen.at.time);
        self.freeze(seen, at);
        let degrees = [seen.look.dark, seen.look.uniform, seen.look.smeared];
        for (i, flag) in [Flag::Dark, Flag::Uniform, Flag::Smeared].into_iter().enumerate() {
            let held = self.held[i].next(degrees[i], at, self.flags.since(flag));
            self.flags.set(flag, held);
        }
        if seen.after_corrupt {
            self.corrupt = Some(now);
            if !self.flags.has(Flag::Corrupt) {
                self.flags.set(Flag::Corrupt, Some(seen.at.time));
            }
        } else if self.corrupt.is_some_and(|it| it + SOUND_AFTER <= now) {
            self.corrupt = None;
            self.flags.set(Flag::Corrupt, None);
        }
        self.flags.rates = self.overload.see(now, seen.gave_way);
        let since = self.flags.since(Flag::Degraded).unwrap_or(seen.at.time);
        self.flags.set(Flag::Degraded, self.flags.rates.map(|_| since));
        self.flags != before
    }

    /// The stream's own time, which only ever grows.
    fn advance(&mut self, at: Moment) -> Duration {
        let now = self.last.map_or(Duration::ZERO, |(last, time)| {
            time + match self.settings.by_pts {
                false => at.arrived.saturating_duration_since(last.arrived),
                true if at.epoch == last.epoch => at.pts.saturating_sub(last.pts),
                true => Duration::ZERO,
            }
        });
        self.last = Some((at, now));
        now
    }

    fn freeze(&mut self, seen: &Seen<'_>, at: (Duration, SystemTime)) {
        let Some(limit) = self.settings.frozen_after else { return };
        let Some(still) = self.still.as_ref().filter(|it| it.look.same(seen.look)) else {
            let look = seen.look.clone();
            self.still = Some(Still { look, since: at, keyframes: seen.keyframes });
            self.flags.set(Flag::Frozen, None);
            return;
        };
        let lasted = at.0 - still.since.0;
        let renewed = seen.keyframes == 0
            || still.keyframes + KEYFRAMES <= seen.keyframes
            || KEYFRAMES_WITHIN <= lasted;
        if limit <= lasted && renewed {
            self.flags.set(Flag::Frozen, Some(still.since.1));
        }
    }
}
