//! What a stream does next: a state machine that has no clock, network or dice of its own.
//!
//! The reader asks before it opens a stream, tells of the first picture and of how a connection
//! broke, and does what it is told: open again, wait, or end. When a connection counts as broken
//! though it says nothing is decided in [`super::watch`]; who may connect now, in [`super::gate`].

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use crate::{
    frame::{Code, State},
    source::{End, SourceError},
};

/// Pictures must have come for this long before a failure counts as a new one.
pub const GOOD_AFTER: Duration = Duration::from_secs(30);

/// A refused password is not tried again before this.
pub const AUTH_PAUSE: Duration = Duration::from_secs(300);

/// How long to wait before the next try. Waits double while a stream keeps failing.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Forgets the failures. For a stream that was good for [`GOOD_AFTER`]; a connection alone
    /// does not count, or a camera that connects and breaks would be tried without end.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure. `random` in 0.0..1.0.
    ///
    /// Full jitter, so that 64 cameras behind one switch do not come back at once; except after a
    /// refused password, where trying early can lock the account.
    pub fn next(&mut self, code: Code, random: f64) -> Duration {
        let doubled =
            |first: f64, last: f64| (first * 2_f64.powi(self.failures.min(16) as i32)).min(last);
        let seconds = match code {
            Code::Auth => AUTH_PAUSE.as_secs_f64() * (1.0 + random / 10.0),
            Code::Codec | Code::NotFound => doubled(5.0, 60.0) * random,
            _ => doubled(0.5, 4.0) * random,
        };
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64(seconds)
    }
}

/// How one connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broke {
    /// The stop token fired.
    Stopped,
    /// The stream said that it is over.
    Eos,
    /// Something went wrong.
    Failed(SourceError),
    /// It was not tried: another stream of the host was refused with the same password, and the
    /// next try is due after this.
    Refused(Duration),
}

/// What to say of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tell {
    /// The state that it is in now.
    pub state: State,
    /// Why, if it has failed.
    pub error: Option<SourceError>,
    /// When the next try is due.
    pub retry_in: Option<Duration>,
    /// Which try this is about, from 1.
    pub attempt: u32,
}

/// What is said last of a stream that is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leave {
    /// The state that it stays in.
    pub state: State,
    /// Why, if it was not an operator's wish.
    pub error: Option<SourceError>,
}

impl Default for Leave {
    /// It is gone.
    fn default() -> Leave {
        Leave { state: State::Removed, error: None }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Open the stream.
    Open,
    /// Open it after this.
    Wait(Duration),
    /// Nothing: it has ended.
    Over(End),
}

/// One stream's state machine.
#[derive(Debug)]
pub struct Supervisor {
    looped: bool,
    /// Set, if at all, before the stream is stopped.
    leave: Arc<OnceLock<Leave>>,
    /// Tries since the stream was last up.
    attempt: u32,
    backoff: Backoff,
    /// When the first picture of this connection came.
    first_picture: Option<Instant>,
    /// The next connection goes on with what was up, as a file does that starts over.
    again: bool,
}

impl Supervisor {
    /// A stream that has not been opened yet. `looped`: a file starts over at its end.
    pub fn new(looped: bool) -> Supervisor {
        let (leave, backoff) = (Arc::default(), Backoff::default());
        Supervisor { looped, leave, attempt: 0, backoff, first_picture: None, again: false }
    }

    /// The same; `leave` holds what to say when it is stopped.
    pub fn leaving(self, leave: Arc<OnceLock<Leave>>) -> Supervisor {
        Supervisor { leave, ..self }
    }

    /// The stream is about to be opened.
    ///
    /// Later tries of one outage are told by nothing but the state they end in.
    pub fn opening(&mut self) -> Option<Tell> {
        self.attempt = self.attempt.saturating_add(1);
        self.first_picture = None;
        (self.attempt == 1 && !self.again).then(|| self.tell(State::Connecting))
    }

    /// A picture has come.
    pub fn picture(&mut self, now: Instant) -> Option<Tell> {
        let Some(first) = self.first_picture else {
            self.first_picture = Some(now);
            return Some(self.tell(State::Up));
        };
        if GOOD_AFTER <= now.saturating_duration_since(first) {
            self.backoff.reset();
        }
        None
    }

    /// What to say where an epoch ends in the middle of a connection.
    pub fn up(&self) -> Tell {
        self.tell(State::Up)
    }

    /// The connection is over. `live`: its end is a failure. `random` in 0.0..1.0.
    pub fn broke(&mut self, broke: Broke, live: bool, random: f64) -> (Tell, Then) {
        let was_up = self.first_picture.is_some();
        let error = match broke {
            Broke::Stopped => {
                let Leave { state, error } = self.leave.get().cloned().unwrap_or_default();
                return (Tell { error, ..self.tell(state) }, Then::Over(End::Stopped));
            }
            // Without a picture, starting over would spin.
            Broke::Eos if !live && self.looped && was_up => {
                let tell = self.tell(State::Up);
                (self.attempt, self.again) = (0, true);
                return (tell, Then::Open);
            }
            Broke::Eos if !live => return (self.tell(State::Ended), Then::Over(End::Ended)),
            Broke::Eos => SourceError { code: Code::Eos, detail: "the live stream ended".into() },
            Broke::Failed(error) if !live => {
                let tell = Tell { error: Some(error), ..self.tell(State::Down) };
                return (tell, Then::Over(End::Failed));
            }
            Broke::Failed(error) => error,
            Broke::Refused(pause) => {
                let detail =
                    "not tried: another stream of this host was refused with this password";
                let error = SourceError { code: Code::Auth, detail: detail.to_owned() };
                // Spread like after a refusal of its own.
                let pause = pause + AUTH_PAUSE.mul_f64(random / 10.0);
                return self.failed(error, pause);
            }
        };
        let pause = self.backoff.next(error.code, random);
        self.failed(error, pause)
    }

    fn failed(&mut self, error: SourceError, pause: Duration) -> (Tell, Then) {
        let state = if error.code == Code::Stall { State::Stalled } else { State::Down };
        let tell = Tell { error: Some(error), retry_in: Some(pause), ..self.tell(state) };
        self.again = false;
        if self.first_picture.take().is_some() {
            self.attempt = 0;
        }
        (tell, Then::Wait(pause))
    }

    fn tell(&self, state: State) -> Tell {
        Tell { state, error: None, retry_in: None, attempt: self.attempt }
    }
}

#[cfg(test)]
#[path = "supervise_tests.rs"]
mod tests;
