//! Who may connect now: cameras that come back together, and recorders with many channels, are
//! not stormed.
//!
//! Three rules, for all streams of the daemon together:
//! - a host is contacted at most [`BURST`] times at once and then [`PER_SECOND`] times a second;
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
    source::{pause, supervise::AUTH_PAUSE},
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
    /// A hash of port, user name and password; `None` without the latter. Behind one address there
    /// may be a camera at each port.
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
    /// Whom a stream connects to, for the rules.
    pub fn peer(
        &self,
        (host, port): (&str, u16),
        username: Option<&Secret>,
        password: Option<&Secret>,
    ) -> Peer {
        let account = (username.is_some() || password.is_some()).then(|| {
            self.hasher.hash_one((port, username.map(Secret::expose), password.map(Secret::expose)))
        });
        Peer { host: host.to_ascii_lowercase(), account }
    }

    /// Waits until the host may be contacted.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn turn(&self, peer: &Peer, stop: &CancellationToken) -> Result<(), Denied> {
        self.wait(stop, |rules| rules.turn(peer, Instant::now()))
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

    /// The host has refused the user name and password.
    pub fn refused(&self, peer: &Peer) {
        self.rules().refused(peer, Instant::now());
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

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    signing_in: bool,
    /// Whether the last try was good.
    good: bool,
    refused_until: Option<Instant>,
}

impl Rules {
    fn turn(&mut self, peer: &Peer, now: Instant) -> Answer {
        if let Some(left) = self.refused_for(peer, now) {
            return Answer::Refused(left);
        }
        // Full buckets are as good as none: hosts that are gone are forgotten.
        self.hosts.retain(|_, it| it.filled(now) < BURST);
        let bucket =
            self.hosts.entry(peer.host.clone()).or_insert(Bucket { tokens: BURST, at: now });
        let tokens = bucket.filled(now);
        if tokens < 1.0 {
            return Answer::Wait(Duration::from_secs_f64((1.0 - tokens) / PER_SECOND));
        }
        *bucket = Bucket { tokens: tokens - 1.0, at: now };
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
            (account.signing_in, account.good) = (false, true);
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
    fn refused(&mut self, peer: &Peer, now: Instant) {
        if peer.account.is_none() {
            return;
        }
        let account = self.accounts.entry(peer.clone()).or_default();
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

impl Bucket {
    fn filled(&self, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        (self.tokens + since * PER_SECOND).min(BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(host: &str, account: Option<u64>) -> Peer {
        Peer { host: host.to_owned(), account }
    }

    #[test]
    fn a_host_is_contacted_eight_times_at_once_and_then_twice_a_second() {
        let (mut rules, start) = (Rules::default(), Instant::now());
        let recorder = peer("recorder", None);
        let mut begun = Vec::new();
        let mut now = start;
        while begun.len() < 64 {
            match rules.turn(&recorder, now) {
                Answer::Go => begun.push(now - start),
                Answer::Wait(pause) => now += pause.max(Duration::from_millis(1)),
                Answer::Refused(_) => unreachable!("nobody has an account"),
            }
        }
        assert_eq!(begun[7], Duration::ZERO);
        assert!((499..510).contains(&begun[8].as_millis()), "{:?}", begun[8]);
        assert!((27_900..28_500).contains(&begun[63].as_millis()), "{:?}", begun[63]);
        assert_eq!(rules.turn(&peer("camera", None), start), Answer::Go, "another host");
    }

    #[test]
    fn eight_streams_connect_at_the_same_time_and_no_more() {
        let (mut rules, now) = (Rules::default(), Instant::now());
        let hosts: Vec<_> = (0..64).map(|it| peer(&format!("camera-{it}"), None)).collect();
        let tickets: Vec<_> = hosts.iter().map(|it| rules.queue(it)).collect();
        let answers: Vec<_> = tickets.iter().map(|it| rules.permit(*it, now)).collect();
        assert_eq!(answers.iter().filter(|it| **it == Answer::Go).count(), CONNECTING_MAX);
        rules.left(&hosts[3], false);
        assert_eq!(rules.permit(tickets[63], now), Answer::Wait(Duration::MAX), "not its turn");
        assert_eq!(rules.permit(tickets[8], now), Answer::Go);
        // Whoever is stopped is not waited for.
        rules.leave_queue(tickets[9]);
        rules.left(&hosts[4], false);
        assert_eq!(rules.permit(tickets[11], now), Answer::Wait(Duration::MAX));
        assert_eq!(rules.permit(tickets[10], now), Answer::Go);
    }

    #[test]
    fn of_32_channels_of_a_recorder_one_tries_a_wrong_password_every_five_minutes() {
        let (mut rules, mut now) = (Rules::default(), Instant::now());
        let recorder = peer("recorder", Some(1));
        let ask = |rules: &mut Rules, now| {
            let ticket = rules.queue(&recorder);
            let answer = rules.permit(ticket, now);
            rules.leave_queue(ticket);
            answer
        };
        for _ in 0..3 {
            let answers: Vec<_> = (0..32).map(|_| ask(&mut rules, now)).collect();
            assert_eq!(answers.iter().filter(|it| **it == Answer::Go).count(), 1);
            rules.refused(&recorder, now);
            rules.left(&recorder, false);
            now += AUTH_PAUSE - Duration::from_millis(1);
            for _ in 0..32 {
                assert!(matches!(ask(&mut rules, now), Answer::Refused(_)));
                assert!(matches!(rules.turn(&recorder, now), Answer::Refused(_)));
            }
            now += Duration::from_millis(1);
        }
        // Another password, and a camera behind the same address, are not punished for it.
        rules.refused(&recorder, now);
        for other in [peer("recorder", Some(2)), peer("recorder", None)] {
            let ticket = rules.queue(&other);
            assert_eq!(rules.permit(ticket, now), Answer::Go);
        }
    }

    #[test]
    fn a_good_password_lets_one_channel_in_after_the_other() {
        let (mut rules, now) = (Rules::default(), Instant::now());
        let recorder = peer("recorder", Some(1));
        let tickets: Vec<_> = (0..32).map(|_| rules.queue(&recorder)).collect();
        let camera = peer("camera", None);
        let other = rules.queue(&camera);
        assert_eq!(rules.permit(tickets[0], now), Answer::Go);
        assert_eq!(rules.permit(other, now), Answer::Go, "those that cannot go hold up nobody");
        rules.left(&camera, false);
        rules.left(&recorder, false);
        for ticket in &tickets[1..] {
            assert_eq!(rules.permit(*ticket, now), Answer::Go);
            rules.left(&recorder, false);
        }
        assert!(rules.accounts.values().all(|it| !it.signing_in) && rules.connecting == 0);
    }

    #[test]
    fn a_channel_that_is_forbidden_does_not_lock_out_those_whose_password_was_taken() {
        let (mut rules, now) = (Rules::default(), Instant::now());
        let recorder = peer("recorder", Some(1));
        let ask = |rules: &mut Rules| {
            let ticket = rules.queue(&recorder);
            rules.permit(ticket, now)
        };
        assert_eq!(ask(&mut rules), Answer::Go);
        rules.signed_in(&recorder);
        assert_eq!(ask(&mut rules), Answer::Go, "before the first has data");
        rules.refused(&recorder, now);
        rules.left(&recorder, false);
        rules.left(&recorder, true);
        assert_eq!(ask(&mut rules), Answer::Go);
        // Twice in a row it is the password.
        rules.refused(&recorder, now);
        rules.left(&recorder, false);
        assert_eq!(ask(&mut rules), Answer::Refused(AUTH_PAUSE));
    }

    #[test]
    fn passwords_are_told_apart_without_being_kept() {
        let gate = Gate::default();
        let [user, good, same, bad] = ["viewer", "a", "a", "b"].map(Secret::new);
        let peer = |password| gate.peer(("Recorder", 554), Some(&user), Some(password));
        assert_eq!(peer(&good), peer(&same));
        assert_ne!(peer(&good), peer(&bad));
        assert_eq!(peer(&good).host, "recorder");
        assert!(!format!("{:?}", peer(&good)).contains("viewer"));
    }

    #[test]
    fn whoever_waits_is_let_in_when_another_leaves_and_stops_when_told() {
        let gate = Arc::new(Gate::default());
        let stop = CancellationToken::new();
        let peer = gate.peer(("recorder", 554), Some(&Secret::new("u")), None);
        let first = gate.permit(&peer, &stop).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| gate.permit(&peer, &stop).map(drop));
            drop(first);
            assert_eq!(second.join().unwrap(), Ok(()));
            let held = gate.permit(&peer, &stop).unwrap();
            let third = scope.spawn(|| gate.permit(&peer, &stop).map(drop));
            stop.cancel();
            assert_eq!(third.join().unwrap(), Err(Denied::Stopped));
            drop(held);
        });
        assert_eq!(gate.connecting(), 0);
    }
}
