//! Which encoded pictures must be decoded where only some are to be labelled. Pure.
//!
//! Pictures are wanted on a grid of time. One that is not wanted is still needed by those that are
//! made from it, up to the next that needs no other. So what comes is held, if such a keyframe will
//! probably come before the next wanted picture, and is forgotten when it does; if it does not, what
//! was held is decoded after all, and nothing but a moment is lost. What no picture is made from is
//! left out at once. Not here: what kind a picture is, which is in its bytes.

use std::{collections::VecDeque, time::Duration};

/// What the other pictures need of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It needs no other, and none after it needs one before it.
    Key,
    /// Others may be made from it.
    Used,
    /// No other is made from it.
    Spare,
}

/// What is to be done with a picture. What is held is to be forgotten when a [`Kind::Key`] comes, and
/// to be decoded, in its order, before one that is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Decode it.
    Decode,
    /// Keep it: it may be needed.
    Hold,
    /// It is not needed.
    LeaveOut,
}

/// Pictures of which the usual distance and the order are learnt. More than any codec reorders.
const WINDOW: usize = 17;

/// Fewer pictures than this show no period.
const PERIOD_MIN: usize = 4;

/// Keyframe intervals that are remembered; the longest of them is expected.
const INTERVALS: usize = 4;

/// Some picture is decoded at least this often, however few are labelled: a stream must be seen to be
/// alive, and a gap of 10 s would be a new epoch.
const GRID_MAX: Duration = Duration::from_secs(4);

/// A time that is so much before the latest is no reordering but a new beginning.
const BACK_MAX: Duration = Duration::from_secs(2);
/// One that is so much after it is no gap but a new beginning.
const AHEAD_MAX: Duration = Duration::from_secs(10);

/// Pictures on their way through the decoder. More than any codec reorders.
const DECODING_MAX: usize = 128;

/// The choice, for one connection.
#[derive(Debug)]
pub struct Needed {
    /// Distance of two lines of the grid.
    grid: Duration,
    /// Lines of the grid for one label.
    per_label: u64,
    /// Time of the line `first`; `None` before the first picture.
    anchor: Option<Duration>,
    first: u64,
    /// The last line that was served.
    line: u64,
    /// The lines served before it and it, with the time of the picture that does, as they came.
    served: VecDeque<(u64, Duration)>,
    /// Times of the last pictures, as they came.
    times: VecDeque<Duration>,
    latest: Duration,
    /// Pictures that may come before one which is shown earlier.
    reorder: u32,
    /// Pictures that are decoded so that the decoder gives the one before them.
    pushing: u32,
    last_key: Option<Duration>,
    intervals: VecDeque<Duration>,
    holding: bool,
    /// The next keyframe is wanted whatever its time: the picture that was wanted is broken.
    again: bool,
    before: Option<(Duration, Then)>,
    /// What went to the decoder: time and line.
    decoding: VecDeque<(Duration, u64)>,
}

impl Needed {
    /// At most `fps` pictures a second are labelled. `None` if that is not a number above 0.
    pub fn new(fps: f64) -> Option<Needed> {
        let per_second = (fps * 1e6).round();
        if !(1.0..1e15).contains(&per_second) {
            return None;
        }
        let label = Duration::from_secs_f64(1e6 / per_second);
        let per_label = label.as_nanos().div_ceil(GRID_MAX.as_nanos()) as u64;
        Some(Needed {
            grid: Duration::from_nanos_u128(label.as_nanos() / u128::from(per_label)),
            per_label,
            anchor: None,
            first: 0,
            line: 0,
            served: VecDeque::with_capacity(WINDOW),
            times: VecDeque::with_capacity(WINDOW),
            latest: Duration::ZERO,
            reorder: 0,
            pushing: 0,
            last_key: None,
            intervals: VecDeque::with_capacity(INTERVALS),
            holding: false,
            again: false,
            before: None,
            decoding: VecDeque::new(),
        })
    }

    /// An encoded picture has come.
    pub fn sees(&mut self, kind: Kind, pts: Duration) -> Then {
        if let Some((before, then)) = self.before
            && before == pts
        {
            // The second field of an interlaced picture.
            return then;
        }
        let new = self.learn(kind, pts);
        let then = self.choose(kind, pts, new);
        self.holding = then == Then::Hold || self.holding && then == Then::LeaveOut;
        self.before = Some((pts, then));
        then
    }

    /// The line that a picture serves which is decoded or held now.
    pub fn line(&self, kind: Kind, pts: Duration) -> u64 {
        self.line.min(self.line_at(pts, self.early(kind)))
    }

    /// A picture goes to the decoder.
    pub fn decodes(&mut self, pts: Duration, line: u64) {
        if self.decoding.len() == DECODING_MAX {
            self.decoding.pop_front();
        }
        self.decoding.push_back((pts, line));
    }

    /// A picture has left the decoder: which label it can have, of labels that are numbered in order.
    /// `None` if it is not one that went in.
    pub fn label(&mut self, pts: Duration, broken: bool) -> Option<u64> {
        let at = self.decoding.iter().position(|it| it.0 == pts)?;
        let (_, line) = self.decoding.remove(at)?;
        self.again |= broken;
        Some(line / self.per_label)
    }

    /// The usual time between two pictures of the camera. `None` for the first few: they may have come
    /// in another order, without those between them.
    pub fn period(&self) -> Option<Duration> {
        if self.times.len() < PERIOD_MIN {
            return None;
        }
        let mut sorted: Vec<_> = self.times.iter().copied().collect();
        sorted.sort_unstable();
        let mut all: Vec<_> = sorted.windows(2).map(|it| it[1] - it[0]).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied()
    }

    /// The longest time between two pictures that are decoded, while the camera sends.
    pub fn longest(&self) -> Duration {
        self.grid * 3 / 2
    }

    /// Remembers the picture. Whether the time began anew with it.
    fn learn(&mut self, kind: Kind, pts: Duration) -> bool {
        let back = pts + BACK_MAX < self.latest || Some(pts) < self.anchor;
        let new = self.anchor.is_none() || back || self.latest + AHEAD_MAX < pts;
        if new {
            // The grid begins with the first picture, and a label's lines stay together.
            let next = (self.line / self.per_label + 1) * self.per_label;
            self.first = if self.anchor.is_none() { 0 } else { next };
            (self.anchor, self.latest, self.last_key) = (Some(pts), pts, None);
            self.times.clear();
            self.served.clear();
            self.intervals.clear();
        }
        if self.times.len() == WINDOW {
            self.times.pop_front();
        }
        let shown_later = self.times.iter().filter(|it| pts < **it).count();
        self.reorder = self.reorder.max(shown_later as u32);
        self.times.push_back(pts);
        self.latest = self.latest.max(pts);
        if kind == Kind::Key
            && let Some(before) = self.last_key.replace(pts)
        {
            if self.intervals.len() == INTERVALS {
                self.intervals.pop_front();
            }
            self.intervals.push_back(pts.saturating_sub(before));
        }
        new
    }

    fn choose(&mut self, kind: Kind, pts: Duration, new: bool) -> Then {
        let line = self.line_at(pts, self.early(kind));
        let again = kind == Kind::Key && std::mem::take(&mut self.again);
        if new || self.line < line && !self.key_serves(kind, pts, line) || again {
            self.line = self.line.max(line);
            self.serve(self.line, pts);
            self.pushing = self.reorder;
            return Then::Decode;
        }
        if self.served.back().is_some_and(|it| pts < it.1) && self.serves_better(line, pts) {
            return Then::Decode;
        }
        if 0 < self.pushing {
            self.pushing -= 1;
            return Then::Decode;
        }
        if kind == Kind::Spare && self.times.len() == WINDOW {
            return Then::LeaveOut;
        }
        let Some(interval) = self.interval() else { return Then::Decode };
        let due = self.last_key.unwrap_or_default() + interval;
        let next = self.time_of(self.line + 1) + self.late();
        // A keyframe that has not come for twice its time may never come.
        let overdue = due + interval < pts;
        if overdue || next < due { Then::Decode } else { Then::Hold }
    }

    /// Whether a picture, which comes after one that is shown later, serves its line better.
    fn serves_better(&mut self, line: u64, pts: Duration) -> bool {
        match self.served.iter_mut().find(|it| it.0 == line) {
            Some(served) if served.1 <= pts => return false,
            Some(served) => served.1 = pts,
            None => {
                let latest = self.served.pop_back();
                self.serve(line, pts);
                self.served.extend(latest);
            }
        }
        true
    }

    fn serve(&mut self, line: u64, pts: Duration) {
        if self.served.len() == WINDOW {
            self.served.pop_front();
        }
        self.served.push_back((line, pts));
    }

    /// Whether a keyframe that is due soon can serve the line: what it precedes need not be decoded.
    fn key_serves(&self, kind: Kind, pts: Duration, line: u64) -> bool {
        let (Some(last), Some(interval)) = (self.last_key, self.interval()) else { return false };
        let due = last + interval;
        let snaps = kind != Kind::Key && self.snaps(interval);
        snaps && pts < due && due <= self.time_of(line) + self.grid / 4
    }

    /// Whether labels are moved to keyframes that are near. Not where those come often anyway.
    fn snaps(&self, interval: Duration) -> bool {
        self.grid / 2 <= interval
    }

    fn interval(&self) -> Option<Duration> {
        self.intervals.iter().max().copied()
    }

    /// How much before its line a picture may be.
    fn early(&self, kind: Kind) -> Duration {
        let half = self.period().unwrap_or_default().min(self.grid) / 2;
        let snaps = kind == Kind::Key && self.interval().is_some_and(|it| self.snaps(it));
        if snaps { half.max(self.grid / 4) } else { half }
    }

    /// How much after its line a keyframe may be.
    fn late(&self) -> Duration {
        let snaps = self.interval().is_some_and(|it| self.snaps(it));
        if snaps { self.grid / 4 } else { self.period().unwrap_or_default().min(self.grid) / 2 }
    }

    fn line_at(&self, pts: Duration, early: Duration) -> u64 {
        let since = pts.saturating_sub(self.anchor.unwrap_or_default());
        self.first + ((since + early).as_nanos() / self.grid.as_nanos()) as u64
    }

    fn time_of(&self, line: u64) -> Duration {
        let nanos = self.grid.as_nanos() * u128::from(line.saturating_sub(self.first));
        self.anchor.unwrap_or_default() + Duration::from_nanos_u128(nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What became of a stream.
    #[derive(Debug, Default)]
    struct Ran {
        /// Times in ms of the pictures that are labelled.
        labels: Vec<u64>,
        decoded: usize,
    }

    /// Sends pictures, given as kind and PTS in ms in the order of decoding, and labels what comes out
    /// in the order of display, as the reader does.
    fn run(fps: f64, pictures: &[(Kind, u64)]) -> Ran {
        let mut needed = Needed::new(fps).unwrap();
        let (mut out, mut held) = (Vec::new(), Vec::new());
        for (kind, ms) in pictures {
            let pts = Duration::from_millis(*ms);
            if *kind == Kind::Key {
                held.clear();
            }
            let then = needed.sees(*kind, pts);
            let line = needed.line(*kind, pts);
            match then {
                Then::Decode => {
                    for (pts, line) in held.drain(..).chain([(pts, line)]) {
                        needed.decodes(pts, line);
                        out.push((pts, needed.label(pts, false).unwrap()));
                    }
                }
                Then::Hold => held.push((pts, line)),
                Then::LeaveOut => {}
            }
        }
        let decoded = out.len();
        out.sort_unstable();
        let mut before = None;
        out.retain(|it| {
            before.replace(it.1).is_none_or(|before| before < it.1) || {
                before = before.max(Some(it.1));
                false
            }
        });
        Ran { labels: out.iter().map(|it| it.0.as_millis() as u64).collect(), decoded }
    }

    /// A camera without reordered pictures: `count` of them `period` ms apart, each `gop`th a key.
    fn camera(period: u64, gop: u64, count: u64) -> Vec<(Kind, u64)> {
        let kind = |i: u64| if i.is_multiple_of(gop) { Kind::Key } else { Kind::Used };
        (0..count).map(|i| (kind(i), i * period)).collect()
    }

    #[test]
    fn where_all_are_wanted_all_are_decoded() {
        for fps in [25.0, 30.0] {
            let ran = run(fps, &camera(40, 50, 500));
            assert_eq!((ran.labels.len(), ran.decoded), (500, 500));
        }
    }

    #[test]
    fn where_keyframes_are_on_the_grid_only_they_are_decoded() {
        let ran = run(1.0, &camera(40, 25, 1_000));
        assert_eq!(ran.labels, (0..40).map(|it| it * 1_000).collect::<Vec<_>>());
        // The first group teaches how far apart they are.
        assert_eq!(ran.decoded, 25 + 39);
        let ran = run(0.1, &camera(40, 50, 10_000));
        assert_eq!(ran.labels, (0..40).map(|it| it * 10_000).collect::<Vec<_>>());
        assert!(ran.decoded < 200, "{ran:?}");
    }

    #[test]
    fn between_keyframes_only_what_comes_after_the_last_wanted_picture_is_left_out() {
        let ran = run(1.0, &camera(40, 50, 1_000));
        assert_eq!(ran.labels, (0..40).map(|it| it * 1_000).collect::<Vec<_>>());
        assert_eq!(ran.decoded, 50 + 19 * 26);
        let ran = run(5.0, &camera(40, 50, 1_000));
        assert_eq!(ran.labels, (0..200).map(|it| it * 200).collect::<Vec<_>>());
        assert_eq!(ran.decoded, 50 + 19 * 46);
    }

    #[test]
    fn labels_follow_keyframes_that_drift_over_the_grid() {
        // 25.05 and 24.95 pictures a second, a keyframe every 25th, for 400 s.
        for period_us in [39_920_u64, 40_080] {
            let pictures: Vec<_> = (0..10_000)
                .map(|i| (if i % 25 == 0 { Kind::Key } else { Kind::Used }, i * period_us / 1_000))
                .collect();
            let ran = run(1.0, &pictures);
            let expected = pictures.last().unwrap().1 / 1_000 + 1;
            assert!(ran.labels.len().abs_diff(expected as usize) <= 1, "{}", ran.labels.len());
            let gaps = ran.labels.windows(2).map(|it| it[1] - it[0]);
            assert!(gaps.clone().all(|it| (700..1_550).contains(&it)), "{:?}", gaps.max());
            assert!(ran.decoded < 7_500, "{}", ran.decoded);
        }
    }

    #[test]
    fn a_keyframe_that_does_not_come_costs_no_label() {
        let mut pictures = camera(40, 25, 200);
        pictures.extend((200..1_000).map(|i| (Kind::Used, i * 40)));
        let ran = run(1.0, &pictures);
        assert_eq!(ran.labels, (0..40).map(|it| it * 1_000).collect::<Vec<_>>());
    }

    #[test]
    fn pictures_that_nothing_is_made_from_are_left_out_if_they_are_not_wanted() {
        // I0 P3 b1 b2 P6 b4 b5 …, one group per 48 pictures.
        let mut pictures = Vec::new();
        for group in (0..20).map(|it| it * 48 * 40) {
            pictures.push((Kind::Key, group));
            for p in (3..48).step_by(3) {
                pictures.push((Kind::Used, group + p * 40));
                pictures.extend([p - 2, p - 1].map(|it| (Kind::Spare, group + it * 40)));
            }
        }
        let all = pictures.len();
        let ran = run(5.0, &pictures);
        assert_eq!(ran.labels.len(), 20 * 48 * 40 / 200);
        assert!(ran.decoded < all * 7 / 10, "{} of {all}", ran.decoded);
        let ran = run(25.0, &pictures);
        assert_eq!((ran.labels.len(), ran.decoded), (all, all));
    }

    #[test]
    fn reordered_pictures_are_labelled_on_the_grid_from_the_first_on() {
        // I0 P4 B2 b1 b3 P8 …, as the first pictures show no period yet.
        let mut pictures = vec![(Kind::Key, 0)];
        for p in (4..400).step_by(4) {
            let kinds = [Kind::Used, Kind::Used, Kind::Spare, Kind::Spare];
            pictures.extend(kinds.into_iter().zip([p, p - 2, p - 3, p - 1].map(|it| it * 40)));
        }
        let ran = run(5.0, &pictures);
        assert_eq!(ran.labels, (0..80).map(|it| it * 200).collect::<Vec<_>>());
        assert!(ran.decoded < 350, "{}", ran.decoded);
    }

    #[test]
    fn gaps_and_jumps_start_no_silence() {
        let mut pictures = camera(40, 25, 250);
        pictures.extend(camera(40, 25, 250).iter().map(|it| (it.0, it.1 + 60_000)));
        pictures.extend(camera(40, 25, 250));
        let mut needed = Needed::new(1.0).unwrap();
        let decoded =
            |it: &(Kind, u64)| needed.sees(it.0, Duration::from_millis(it.1)) == Then::Decode;
        let decoded: Vec<_> = pictures.iter().map(decoded).collect();
        assert!(decoded[250] && decoded[500]);
        assert!(decoded.chunks(25).all(|it| it.contains(&true)));
    }

    #[test]
    fn after_a_broken_picture_the_next_keyframe_is_wanted() {
        let mut needed = Needed::new(0.5).unwrap();
        let ms = Duration::from_millis;
        let mut decoded = Vec::new();
        for (i, (kind, at)) in camera(40, 25, 300).into_iter().enumerate() {
            if needed.sees(kind, ms(at)) == Then::Decode {
                needed.decodes(ms(at), needed.line(kind, ms(at)));
                needed.label(ms(at), i == 200);
                decoded.push(i);
            }
        }
        assert_eq!(decoded[25..], [50, 100, 150, 200, 225, 250]);
    }

    #[test]
    fn both_fields_of_a_picture_go_the_same_way() {
        let mut needed = Needed::new(1.0).unwrap();
        for (kind, ms) in camera(40, 25, 100) {
            let first = needed.sees(kind, Duration::from_millis(ms));
            assert_eq!(needed.sees(Kind::Used, Duration::from_millis(ms)), first);
        }
    }
}
