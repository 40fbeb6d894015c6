//! How much of the past a journal keeps, and how old an event is when the host's clock was set.
//!
//! Events carry the wall clock's time of their appending. When that clock is set while the journal is
//! open, the step is noted with the first sequence number after it, so that events on either side have
//! the age that they would have without it: a clock that runs an hour ahead for a minute deletes
//! nothing, and neither does one that is set from 1970 to the present. What happened to the clock while
//! the journal was closed is not known but where time cannot have passed so: see [`while_closed`].

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rusqlite::{Connection, OptionalExtension, params};

/// A difference between the clocks that is smaller is no step.
const STEP_MIN_US: i64 = 1_000_000;

/// 2020 by the wall clock: nothing was written with this program before.
const FIRST_US: i64 = 1_577_836_800_000_000;

/// More steps than this are put together.
const STEPS_MAX: usize = 64;

/// How much the journal keeps. The oldest events go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retain {
    /// At most about this many bytes in the file, if given.
    pub bytes: Option<u64>,
    /// Nothing older than this, if given.
    pub age: Option<Duration>,
    /// This many bytes of the file system stay free for others.
    pub keep_free: u64,
}

/// The steps of the wall clock since the oldest event, in their order.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// Each with the first sequence number after it, and by how many microseconds the clock was set.
    steps: Vec<(u64, i64)>,
    /// The wall clock less the monotonic one, in microseconds, as it was last looked at.
    before: Option<i64>,
    /// When the last event was appended, by the wall clock of then. `None` iff there is none, or the
    /// clocks were looked at since.
    last: Option<i64>,
    /// The number that the first event after the opening gets, and by how much the clock was behind the
    /// last event then. Once it is set forward, that much of the step is no new time.
    behind: Option<(u64, i64)>,
    /// Whether the journal has them all.
    pub(super) is_noted: bool,
}

impl Steps {
    /// What was noted when the journal was last written.
    pub(super) fn noted(connection: &Connection) -> rusqlite::Result<Steps> {
        let sql = "SELECT value FROM meta WHERE key = 'steps'";
        let text = connection.query_row(sql, [], |row| row.get::<_, String>(0)).optional()?;
        let step = |it: &str| {
            let (seq, step) = it.split_once(':')?;
            Some((seq.parse().ok()?, step.parse().ok()?))
        };
        let steps = text.iter().flat_map(|it| it.split(' ')).filter_map(step).collect();
        let sql = "SELECT appended_us FROM event ORDER BY seq DESC LIMIT 1";
        let last = connection.query_row(sql, [], |row| row.get(0)).optional()?;
        Ok(Steps { steps, before: None, last, behind: None, is_noted: true })
    }

    /// Notes them for the next time.
    pub(super) fn note(&self, connection: &Connection) -> rusqlite::Result<()> {
        if self.is_noted {
            return Ok(());
        }
        let steps: Vec<_> = self.steps.iter().map(|(seq, by)| format!("{seq}:{by}")).collect();
        let sql = "INSERT OR REPLACE INTO meta VALUES ('steps', ?1)";
        connection.prepare_cached(sql)?.execute(params![steps.join(" ")])?;
        Ok(())
    }

    /// Compares the clocks, both in microseconds; the next event will get the number `next`.
    pub(super) fn look(&mut self, wall: i64, mono: i64, (oldest, next): (u64, u64)) {
        let now = wall.saturating_sub(mono);
        let closed = self.last.take().map_or(0, |last| {
            let closed = while_closed(last, wall);
            let behind = last.saturating_sub(wall);
            self.behind = (closed == 0 && 0 < behind).then_some((next, behind));
            closed
        });
        let step = self.before.map_or(closed, |before| now.saturating_sub(before));
        self.before.get_or_insert(now);
        if step.unsigned_abs() < STEP_MIN_US.unsigned_abs() {
            return;
        }
        self.before = Some(now);
        self.is_noted = false;
        self.steps.retain(|it| oldest < it.0);
        // Before the first event there is nothing that could be too old.
        if oldest < next {
            if let Some((opening, behind)) = self.behind.as_mut().filter(|_| 0 < step) {
                let back = step.min(*behind);
                *behind -= back;
                let opening = *opening;
                self.add(opening, -back);
            }
            self.add(next, step);
        }
        if STEPS_MAX < self.steps.len() {
            // Events between the two count as younger than they are, never as older.
            let (_, first) = self.steps.remove(0);
            self.steps[0].1 = self.steps[0].1.max(first.saturating_add(self.steps[0].1));
        }
    }

    /// Adds a step before the event `seq`.
    fn add(&mut self, seq: u64, step: i64) {
        let at = self.steps.partition_point(|it| it.0 < seq);
        match self.steps.get_mut(at).filter(|it| it.0 == seq) {
            Some(there) => there.1 = there.1.saturating_add(step),
            None => self.steps.insert(at, (seq, step)),
        }
    }

    /// What the wall clock would say if it had not been set since the last look: what was appended
    /// until then must not seem older or younger by it.
    fn unset(&self, wall: i64, mono: i64) -> i64 {
        let Some(before) = self.before else { return wall };
        let step = wall.saturating_sub(mono).saturating_sub(before);
        if step.unsigned_abs() < STEP_MIN_US.unsigned_abs() { wall } else { wall - step }
    }

    /// By how much the clock was set since `oldest` was appended, in microseconds, and up to which
    /// number that holds.
    pub(super) fn since(&self, oldest: u64) -> (i64, u64) {
        let later = || self.steps.iter().filter(|it| oldest < it.0);
        let by = later().fold(0_i64, |sum, it| sum.saturating_add(it.1));
        (by, later().next().map_or(u64::MAX, |it| it.0))
    }
}

/// By how much the wall clock was surely set between the last event and the opening of the journal: a
/// host that starts in 1970 is behind its last event, and one that was in 1970 and is not any more has
/// not been off for all the years between. Such events count as young at the opening. A clock that is
/// merely behind the last event may be right again at the next opening without anybody having seen the
/// step, so nothing is noted of it before it is set: see `Steps::behind`.
fn while_closed(last: i64, now: i64) -> i64 {
    let in_1970 = |it| it < FIRST_US;
    let set = if in_1970(now) { now < last } else { in_1970(last) };
    if set { now.saturating_sub(last) } else { 0 }
}

/// How old events are: asked by the writer, which also notes when the wall clock was set, and by the
/// sinks beside it.
#[derive(Debug)]
pub struct Ages {
    steps: Mutex<Steps>,
    /// What the monotonic clock counts from.
    opened: Instant,
}

impl Ages {
    pub(super) fn new(steps: Steps) -> Ages {
        Ages { steps: Mutex::new(steps), opened: Instant::now() }
    }

    pub(super) fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The monotonic clock, in microseconds.
    pub(super) fn mono(&self) -> i64 {
        i64::try_from(self.opened.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    /// The age of an event, if `wall` is the time and it was appended at `appended_us`, both in
    /// microseconds of the wall clock.
    pub(super) fn of(&self, seq: u64, appended_us: i64, wall: i64) -> Duration {
        let mono = self.mono();
        let steps = self.steps();
        let age = steps.unset(wall, mono) - steps.since(seq).0 - appended_us;
        Duration::from_micros(u64::try_from(age).unwrap_or_default())
    }
}

/// The first event in `oldest..end` that was appended at or after the cut-off, or `end`.
pub(super) fn first_younger(
    connection: &Connection,
    oldest: u64,
    end: u64,
    cutoff: i64,
) -> rusqlite::Result<u64> {
    let mut statement = connection.prepare_cached(
        "SELECT min(seq) FROM event WHERE ?1 <= seq AND seq < ?2 AND ?3 <= appended_us",
    )?;
    let found: Option<i64> =
        statement.query_row(params![oldest as i64, end as i64, cutoff], |row| row.get(0))?;
    Ok(found.map_or(end, |it| it as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000_000;

    #[test]
    fn steps_are_summed_from_an_event_on() {
        let mut it = Steps::default();
        it.look(5 * HOUR, 0, (1, 10));
        it.look(5 * HOUR + 999_999, 0, (1, 10));
        assert_eq!(it.since(1), (0, u64::MAX), "less than a second");
        it.look(6 * HOUR + 10, 10, (1, 10));
        assert_eq!(it.since(9), (HOUR, 10));
        it.look(6 * HOUR + 20, 20, (1, 15));
        it.look(5 * HOUR + 30, 30, (1, 20));
        assert_eq!([it.since(1), it.since(9)], [(0, 10), (0, 10)]);
        assert_eq!([it.since(10), it.since(19)], [(-HOUR, 20), (-HOUR, 20)]);
        assert_eq!(it.since(20), (0, u64::MAX));
        // Two steps without an event in between are one.
        it.look(6 * HOUR + 40, 40, (12, 20));
        assert_eq!(it.since(12), (0, 20));
    }

    #[test]
    fn a_clock_that_was_set_while_the_journal_was_closed_shows_by_what_cannot_be() {
        let year = 365 * 24 * HOUR;
        let (in_1970, in_2026) = (HOUR, 56 * year);
        let set = |last, now| while_closed(last, now);
        assert_eq!(set(in_2026, in_2026 + year), 0, "it may have been off for a year");
        assert_eq!(set(in_2026, in_2026 - HOUR), 0, "it may be right the next time");
        assert_eq!(set(in_2026, in_1970), in_1970 - in_2026);
        assert_eq!(set(in_1970, in_2026), in_2026 - in_1970);
        assert_eq!(set(in_1970, 2 * in_1970), 0);
    }

    #[test]
    fn a_clock_that_is_set_without_end_makes_no_event_older() {
        let mut it = Steps::default();
        let mut real = vec![0; 201];
        let mut wall = 0;
        it.look(wall, 0, (1, 1));
        for seq in 1..=200_u64 {
            let step = if seq % 3 == 0 { -2 * HOUR } else { HOUR };
            wall += step;
            it.look(wall, 0, (1, seq));
            (1..seq).for_each(|before| real[before as usize] += step);
        }
        assert!(it.steps.len() <= STEPS_MAX);
        for seq in 1..=200 {
            let (by, until) = it.since(seq);
            assert!(real[seq as usize] <= by, "{seq}");
            assert!(until == u64::MAX || seq < until);
        }
    }

    #[test]
    fn ages_do_not_follow_a_wall_clock_that_is_set() {
        let it = Ages::new(Steps::default());
        let mut wall = 100 * HOUR;
        it.steps().look(wall, it.mono(), (1, 10));
        let age = |seq, appended, wall| it.of(seq, appended, wall).as_secs_f64().round();
        assert_eq!(age(5, wall - HOUR / 2, wall), 1_800.0);
        for set in [HOUR, -2 * HOUR] {
            // Before the writer has seen it, and after.
            let appended = wall;
            wall += set;
            assert_eq!(age(5, appended - HOUR / 2, wall), 1_800.0, "{set}");
            it.steps().look(wall, it.mono(), (1, 10));
            assert_eq!(age(5, appended - HOUR / 2, wall), 1_800.0, "{set}");
            assert_eq!(age(10, wall - HOUR / 4, wall), 900.0, "{set}: appended after it");
            it.steps().steps.clear();
        }
        assert_eq!(age(5, wall + HOUR, wall), 0.0, "never less than nothing");
    }

    #[test]
    fn a_clock_that_is_behind_at_the_opening_makes_no_event_older() {
        let day = 24 * HOUR;
        let year = 365 * day;
        // A hundred events, the last of them when it is `last`.
        let opened = |steps, last| Steps { steps, last: Some(last), ..Steps::default() };
        let last = 56 * year;
        let mut it = opened(vec![], last);
        it.look(last - year, 0, (1, 101));
        assert_eq!(it.since(1), (0, u64::MAX), "as long as nobody has set it");
        // It ends before anybody does, and the clock is right the next time: a day later.
        let mut next = opened(it.steps.clone(), last - year);
        next.look(last + day, 0, (1, 111));
        assert_eq!(last + day - next.since(1).0 - last, day, "the age of the last event");
        // Or the clock is set while it runs, after ten more events.
        it.look(last + day, 0, (1, 111));
        assert_eq!(
            last + day - it.since(1).0 - last,
            0,
            "what passed while it was closed is not known"
        );
        assert_eq!(last + day - it.since(105).0 - (last - year), 0);
        assert_eq!(it.since(111), (0, u64::MAX));
        it.look(last + 2 * day, 0, (1, 121));
        assert_eq!(last + 2 * day - it.since(1).0 - last, 0, "a second step is one as any other");
    }
}
