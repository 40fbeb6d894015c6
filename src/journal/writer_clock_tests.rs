//! Retention by age under a wall clock that is set: by an operator, by NTP after a start in 1970.

use super::{
    tests::{append, folder, page},
    *,
};

thread_local! {
    /// By how much this test's wall clock was set, in microseconds.
    static SET: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}

const MINUTE: i64 = 60_000_000;

/// From today back to 1970.
fn to_1970() -> i64 {
    5 * MINUTE - micros_now()
}

/// A journal that keeps ten minutes, by this test's wall clock.
fn keeping(path: &Path) -> Writer {
    let retain = Retain { age: Some(Duration::from_secs(600)), ..Retain::default() };
    let mut writer = Writer::open(path, retain).unwrap();
    writer.wall = || micros_now() + SET.get();
    writer
}

/// What is left after retention has looked.
fn oldest(writer: &mut Writer) -> u64 {
    writer.looked = None;
    while writer.maintain().unwrap() {}
    writer.stats().oldest
}

/// Retention goes on: ten minutes later everything that is there has expired.
fn check_expires(writer: &mut Writer) {
    let next = writer.stats().next;
    *writer.ages.steps() = Steps::noted(&writer.connection).unwrap();
    SET.set(SET.get() + 11 * MINUTE);
    assert_eq!(oldest(writer), next, "what is too old goes");
}

#[test]
fn retention_by_age_does_not_follow_a_host_clock_that_is_set() {
    let (_folder, path) = folder();
    let mut writer = keeping(&path);
    append(&mut writer, 100);
    for set in [60, 0, -60, 0, 60] {
        SET.set(set * MINUTE);
        assert_eq!(oldest(&mut writer), 1, "set by {set} minutes");
        append(&mut writer, 10);
    }
    // What was set is known after a restart.
    drop(writer);
    let mut writer = keeping(&path);
    assert_eq!(oldest(&mut writer), 1);
    let numbers: Vec<_> = page(&path, 0).records.iter().map(|it| it.seq).collect();
    assert_eq!(numbers, (1..=150).collect::<Vec<_>>(), "order is by number");
    // Eleven minutes that have passed and are no step: all are too old, on both sides of each.
    *writer.ages.steps() = Steps::noted(&writer.connection).unwrap();
    SET.set(71 * MINUTE);
    assert_eq!(oldest(&mut writer), 151);
}

#[test]
fn a_host_that_starts_in_1970_loses_no_event_when_its_clock_is_set_and_keeps_none_for_ever() {
    let (_folder, path) = folder();
    let mut writer = keeping(&path);
    append(&mut writer, 100);
    drop(writer);
    // It was off for two minutes, has no clock of its own, and NTP answers later.
    SET.set(to_1970());
    let mut writer = keeping(&path);
    assert_eq!(oldest(&mut writer), 1, "started in 1970");
    append(&mut writer, 10);
    assert_eq!(oldest(&mut writer), 1);
    SET.set(2 * MINUTE);
    assert_eq!(oldest(&mut writer), 1, "set from 1970 to the present");
    append(&mut writer, 10);
    SET.set(to_1970());
    assert_eq!(oldest(&mut writer), 1, "set back");
    append(&mut writer, 10);
    SET.set(2 * MINUTE);
    assert_eq!(oldest(&mut writer), 1, "and to the present again");
    append(&mut writer, 10);
    assert_eq!(writer.stats().lost, 0);
    check_expires(&mut writer);
}

#[test]
fn what_was_written_in_1970_is_not_56_years_old_after_a_start_in_the_present() {
    let (_folder, path) = folder();
    SET.set(to_1970());
    let mut writer = keeping(&path);
    append(&mut writer, 100);
    drop(writer);
    SET.set(0);
    let mut writer = keeping(&path);
    assert_eq!(oldest(&mut writer), 1);
    append(&mut writer, 10);
    assert_eq!(oldest(&mut writer), 1);
    check_expires(&mut writer);
}
