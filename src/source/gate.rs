//! Who may connect now: cameras that come back together, and recorders with many channels, are
//! not stormed.
//!
//! Three rules, for all streams of the daemon together:
//! - a host is contacted at most [`BURST`] times at once and then [`PER_SECOND`] times a second,
//!   first come first served;
//! - one connection at a time signs in with the same user name and password on a server, and after a
//!   refusal that follows no good try none does for [`AUTH_PAUSE`]: 32 channels must not lock the
//!   account of their recorder;
//! - at most [`CONNECTING_MAX`] streams are between opening and their first data, each for
//!   [`PLACE_MAX`].

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{
    secret::Secret,
    source::{pause::pause, supervise::AUTH_PAUSE},
};

/// Connections to one host that may begin at once.
pub const BURST: f64 = 8.0;

/// Further connections to one host that may begin in a second.
pub const PER_SECOND: f64 = 2.0;

/// Streams that may be connecting at the same time.
pub const CONNECTING_MAX: usize = 8;

/// Longest time that a stream holds one of those places while nothing comes of it.
pub const PLACE_MAX: Duration = Duration::from_secs(5);

/// Longest wait before the rules are asked again, should nobody call.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Whom a stream connects to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    host: String,
    /// A hash of port and all that signs in; `None` without the latter. Behind one address there may
    /// be a camera at each port.
    account: Option<u64>,
}

/// The rules of one daemon, shared by its streams.
#[derive(Debug, Default)]
pub struct Gate {
    rules: Mutex<Rules>,
    /// Makes hashes of passwords that mean nothing outside of this process.
    hasher: RandomState,
}

/// Why a stream may not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// The stop token fired.
    Stopped,
    /// The host refused the same user name and password; ask again after this.
    Refused(Duration),
}

/// The right to connect. Ends when it is dropped.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Gate>,
    peer: Peer,
    since: Instant,
    signed_in: bool,
}

impl Permit {
    /// The password was taken: the next may try it.
    pub fn signed_in(&mut self) {
        if !std::mem::replace(&mut self.signed_in, true) {
            self.gate.rules().signed_in(&self.peer);
        }
    }

    /// Whether the stream takes so long that its place should be another's.
    pub fn is_over(&self) -> bool {
        PLACE_MAX <= self.since.elapsed()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.rules().left(&self.peer, self.signed_in);
    }
}

impl Gate {
    /// Whom a stream connects to, for the rules. `signs_in`: user name, password, and what of the
    /// URL does the same.
    pub fn peer(&self, (host, port): (&str, u16), signs_in: [Option<&Secret>; 3]) -> Peer {
        let secrets = signs_in.map(|it| it.map(Secret::expose));
        let any = secrets.iter().any(Option::is_some);
        let account = any.then(|| self.hasher.hash_one((port, secrets)));
        Peer { host: host.to_ascii_lowercase(), account }
    }

    /// Waits until the host may be contacted.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn turn(&self, peer: &Peer, stop: &CancellationToken) -> Result<(), Denied> {
        let ticket = self.rules().line_up(peer);
        let answer = self.wait(stop, |rules| rules.turn(ticket, Instant::now()));
        self.rules().leave_line(ticket);
        answer
    }

    /// Waits until the stream may connect. To be asked after [`Gate::turn`].
    ///
    /// # Errors
    /// [`Denied`].
    pub fn permit(
        self: &Arc<Self>,
        peer: &Peer,
        stop: &CancellationToken,
    ) -> Result<Permit, Denied> {
        let ticket = self.rules().queue(peer);
        let answer = self.wait(stop, |rules| rules.permit(ticket, Instant::now()));
        self.rules().leave_queue(ticket);
        answer?;
        let (gate, since) = (self.clone(), Instant::now());
        Ok(Permit { gate, peer: peer.clone(), since, signed_in: false })
    }

    /// The host has refused the user name and password. `forbidden`: the id of the stream, if it was
    /// with an answer that may mean this one only.
    pub fn refused(&self, peer: &Peer, forbidden: Option<&str>) {
        self.rules().refused(peer, forbidden, Instant::now());
    }

    /// Streams that are connecting now.
    pub fn connecting(&self) -> usize {
        self.rules().connecting
    }

    fn wait(
        &self,
        stop: &CancellationToken,
        ask: impl Fn(&mut Rules) -> Answer,
    ) -> Result<(), Denied> {
        while !stop.is_cancelled() {
            let until = {
                let mut rules = self.rules();
                match ask(&mut rules) {
                    Answer::Go => return Ok(()),
                    Answer::Refused(left) => return Err(Denied::Refused(left)),
                    Answer::Wait(until) => {
                        let me = thread::current();
                        rules.waiting.retain(|it| it.id() != me.id());
                        rules.waiting.push(me);
                        until
                    }
                }
            };
            pause(stop, until.min(ASK_AGAIN));
        }
        Err(Denied::Stopped)
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the rules say.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Go,
    /// Not before this has passed, or another has left.
    Wait(Duration),
    /// The account is refused for this long.
    Refused(Duration),
}

/// The rules; the caller brings the time.
#[derive(Debug, Default)]
struct Rules {
    connecting: usize,
    hosts: HashMap<String, Bucket>,
    /// Those that ask for a turn, by the number of their ticket.
    line: BTreeMap<u64, Peer>,
    accounts: HashMap<Peer, Account>,
    /// Those that ask for a permit, first come first served, by the number of their ticket.
    queue: BTreeMap<u64, Peer>,
    next_ticket: u64,
    /// Whom to wake when another leaves.
    waiting: Vec<Thread>,
}

/// A host's tokens, when they were last counted.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

#[derive(Clone, Debug, Default)]
struct Account {
    signing_in: bool,
    /// Whether the last try was good.
    good: bool,
    /// Whether any try was.
    ever_good: bool,
    /// The streams that were forbidden.
    forbidden: HashSet<String>,
    refused_until: Option<Instant>,
}

impl Rules {
    fn line_up(&mut self, peer: &Peer) -> u64 {
        self.next_ticket += 1;
        self.line.insert(self.next_ticket, peer.clone());
        self.next_ticket
    }

    fn leave_line(&mut self, ticket: u64) {
        if self.line.remove(&ticket).is_some() {
            self.wake();
        }
    }

    fn turn(&mut self, ticket: u64, now: Instant) -> Answer {
        let peer = self.line[&ticket].clone();
        if let Some(left) = self.refused_for(&peer, now) {
            return Answer::Refused(left);
        }
        let earlier = self.line.range(..ticket).filter(|it| it.1.host == peer.host).count();
        // Full buckets are as good as none: hosts that are gone are forgotten.
        self.hosts.retain(|_, it| it.filled(now) < BURST);
        let bucket = self.hosts.entry(peer.host).or_insert(Bucket { tokens: BURST, at: now });
        let tokens = bucket.filled(now);
        let missing = 1.0 + earlier as f64 - tokens;
        if 0 < earlier || 0.0 < missing {
            // Those before are woken by now if there are tokens for all, and wake this one.
            return Answer::Wait(Duration::from_secs_f64((missing / PER_SECOND).max(0.05)));
        }
        *bucket = Bucket { tokens: tokens - 1.0, at: now };
        self.leave_line(ticket);
        Answer::Go
    }

    fn queue(&mut self, peer: &Peer) -> u64 {
        self.next_ticket += 1;
        self.queue.insert(self.next_ticket, peer.clone());
        self.next_ticket
    }

    fn leave_queue(&mut self, ticket: u64) {
        if self.queue.remove(&ticket).is_some() {
            self.wake();
        }
    }

    fn permit(&mut self, ticket: u64, now: Instant) -> Answer {
        let peer = self.queue[&ticket].clone();
        if let Some(left) = self.refused_for(&peer, now) {
            return Answer::Refused(left);
        }
        let mut signing_in: HashSet<&Peer> =
            self.accounts.iter().filter(|it| it.1.signing_in).map(|it| it.0).collect();
        // A place for each that came earlier and could take it; what is left is for later ones.
        let mut places = CONNECTING_MAX.saturating_sub(self.connecting);
        for earlier in self.queue.range(..ticket).map(|it| it.1) {
            if earlier.account.is_none() || signing_in.insert(earlier) {
                places = places.saturating_sub(1);
            }
        }
        if places == 0 || peer.account.is_some() && signing_in.contains(&peer) {
            return Answer::Wait(Duration::MAX);
        }
        if peer.account.is_some() {
            self.accounts.entry(peer).or_default().signing_in = true;
        }
        self.queue.remove(&ticket);
        self.connecting += 1;
        Answer::Go
    }

    fn signed_in(&mut self, peer: &Peer) {
        if let Some(account) = self.accounts.get_mut(peer) {
            (account.signing_in, account.good, account.ever_good) = (false, true, true);
        }
        self.wake();
    }

    fn left(&mut self, peer: &Peer, signed_in: bool) {
        self.connecting -= 1;
        // Another may be signing in by now.
        if !signed_in && let Some(account) = self.accounts.get_mut(peer) {
            account.signing_in = false;
        }
        self.wake();
    }

    fn wake(&mut self) {
        self.waiting.drain(..).for_each(|it| it.unpark());
    }

    /// After a good try the first refusal is the stream's own: it may lack a right that others have.
    fn refused(&mut self, peer: &Peer, forbidden: Option<&str>, now: Instant) {
        if peer.account.is_none() {
            return;
        }
        let account = self.accounts.entry(peer.clone()).or_default();
        if forbidden.is_some_and(|it| account.is_own(it)) {
            return;
        }
        if !std::mem::take(&mut account.good) {
            account.refused_until = Some(now + AUTH_PAUSE);
        }
    }

    fn refused_for(&mut self, peer: &Peer, now: Instant) -> Option<Duration> {
        let account = self.accounts.get_mut(peer)?;
        let left = account.refused_until?.saturating_duration_since(now);
        if left.is_zero() {
            account.refused_until = None;
            return None;
        }
        Some(left)
    }
}

impl Account {
    /// Whether *forbidden* says nothing of the others: the first does not, and once the password was
    /// taken neither does its repetition. But some recorders say it of a wrong password.
    fn is_own(&mut self, stream: &str) -> bool {
        let new = self.forbidden.insert(stream.to_owned());
        if new { self.forbidden.len() == 1 } else { self.ever_good }
    }
}

impl Bucket {
    fn filled(&self, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        (self.tokens + since * PER_SECOND).min(BURST)
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
