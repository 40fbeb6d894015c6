//! Between a stream's frames and its events: looks at each picture, and tells what has changed.

use std::{sync::Arc, time::SystemTime};

use super::{
    Flag, Flags, Settings,
    measure::Degree,
    track::{Moment, Seen, Tracker},
};
use crate::{
    frame::{Meta, State, StateChange},
    ledger::Stream,
    stage::Reason,
};

/// One stream's health, and the state that it is in.
#[derive(Debug)]
pub struct Watch {
    tracker: Tracker,
    /// The state told last, when it began, and its try of connecting.
    told: Option<(State, SystemTime, u32)>,
}

impl Watch {
    /// A stream that nothing is known about.
    pub fn new(settings: Settings) -> Watch {
        Watch { tracker: Tracker::new(settings), told: None }
    }

    /// What holds.
    pub fn flags(&self) -> Flags {
        self.tracker.flags()
    }

    /// Completes a change of state with what holds. A stream that is not up has no pictures, so
    /// nothing holds.
    pub fn changed(&mut self, change: &mut StateChange) {
        if change.state != State::Up {
            self.tracker.reset();
        }
        if let Some((state, since, _)) = self.told
            && state == change.state
        {
            change.since = since;
        }
        self.told = Some((change.state, change.since, change.attempt));
        change.flags = self.tracker.flags();
    }

    /// Looks at the next frame of `stream`, and says in it what is wrong with its picture. Gives
    /// what is to be told before it, if the flags have changed.
    pub fn seen(&mut self, meta: &mut Meta, stream: &Arc<Stream>) -> Option<StateChange> {
        let look = meta.quality.look.as_ref()?;
        let corrupt = meta.quality.flags.contains(&Flag::Corrupt);
        let after_corrupt = corrupt || meta.skipped.iter().any(|it| it.0 == Reason::Corrupt);
        let at = Moment {
            epoch: meta.epoch,
            pts: meta.pts,
            arrived: meta.timing.arrived,
            time: meta.time,
        };
        let gave_way = meta.skipped.get(Reason::Overload) + meta.skipped.get(Reason::Stale);
        let seen = Seen { look, at, keyframes: stream.keyframes(), after_corrupt, gave_way };
        let news = self.tracker.see(&seen);
        let flags = self.tracker.flags();
        let holds = |it: &Flag| match it {
            Flag::Frozen => flags.has(Flag::Frozen),
            Flag::Dark => look.dark == Degree::Yes,
            Flag::Uniform => look.uniform == Degree::Yes,
            Flag::Smeared => look.smeared == Degree::Yes,
            Flag::Corrupt => corrupt,
            // Not the picture's.
            Flag::Degraded => false,
        };
        meta.quality.flags = Flag::ALL.into_iter().filter(holds).collect();
        news.then(|| self.news(stream, meta.ingest_time, flags))
    }

    /// Whether a picture with these flags gets a label.
    pub fn labels(&self, flags: &[Flag]) -> bool {
        let settings = self.tracker.settings();
        flags.iter().all(|it| match it {
            Flag::Corrupt => settings.label_corrupt_pictures,
            _ => settings.label_bad_pictures,
        })
    }

    /// The state goes on; only the flags are new.
    fn news(&self, stream: &Arc<Stream>, at: SystemTime, flags: Flags) -> StateChange {
        let (state, since, attempt) = self.told.unwrap_or((State::Up, at, 1));
        StateChange {
            stream: stream.clone(),
            state,
            code: None,
            detail: None,
            log: Vec::new(),
            attempt,
            retry_in: None,
            at,
            since,
            flags,
            ended: None,
        }
    }
}
