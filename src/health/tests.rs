//! Made pictures for each flag, and what must not raise one; streams on a made clock.

use std::{
    hint::black_box,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Flag, Flags, Settings,
    measure::{Degree, Look, measure},
    track::{Moment, Seen, Tracker},
};

const SIDE: usize = 224;

/// Numbers that look random.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    /// From -`size` to `size`.
    fn around(&mut self, size: f32) -> f32 {
        (self.next() as f32 / u32::MAX as f32 * 2.0 - 1.0) * size
    }
}

fn picture(side: usize, mut colour: impl FnMut(usize, usize) -> [f32; 3]) -> Vec<u8> {
    let mut pixels = Vec::with_capacity(side * side * 3);
    for y in 0..side {
        for x in 0..side {
            pixels.extend(colour(x, y).map(|it| it.round().clamp(0.0, 255.0) as u8));
        }
    }
    pixels
}

/// A scene with edges, gradients and texture, with so much noise.
fn scene(side: usize, noise: f32, seed: u32) -> Vec<u8> {
    let mut random = Noise(seed | 1);
    picture(side, |x, y| {
        let (x, y) = (x as f32 / side as f32, y as f32 / side as f32);
        let sky = if y < 0.3 + 0.1 * (x * 9.0).sin() { 90.0 } else { 0.0 };
        let texture = 25.0 * (x * 61.0).sin() * (y * 47.0).cos();
        let base = 80.0 + 60.0 * x + sky + texture;
        [base, base * 0.9, base * 0.7 + 20.0].map(|it| it + random.around(noise))
    })
}

/// The scene, whose rows from `from` on are what `row` makes of the last one above.
fn damaged(from: usize, row: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let mut pixels = scene(SIDE, 4.0, 7);
    let pitch = SIDE * 3;
    let filled = row(&pixels[(from - 1) * pitch..from * pitch]);
    pixels[from * pitch..].chunks_exact_mut(pitch).for_each(|it| it.copy_from_slice(&filled));
    pixels
}

fn flags(look: &Look) -> Vec<Flag> {
    [(Flag::Dark, look.dark), (Flag::Uniform, look.uniform), (Flag::Smeared, look.smeared)]
        .into_iter()
        .filter_map(|(flag, it)| (it == Degree::Yes).then_some(flag))
        .collect()
}

fn flags_of(pixels: &[u8]) -> Vec<Flag> {
    flags(&measure(pixels, SIDE))
}

#[test]
fn black_is_dark_and_uniform_and_a_colour_is_uniform_whatever_the_inputs_side() {
    for side in [16, 112, 160, 224, 225, 1024] {
        let of = |pixels: Vec<u8>| flags(&measure(&pixels, side));
        assert_eq!(of(picture(side, |_, _| [0.0; 3])), [Flag::Dark, Flag::Uniform], "{side}");
        assert_eq!(of(picture(side, |_, _| [20.0, 90.0, 250.0])), [Flag::Uniform], "{side}");
        assert_eq!(of(picture(side, |_, _| [255.0; 3])), [Flag::Uniform], "{side}");
        assert_eq!(of(scene(side, 3.0, 1)), [], "{side}");
    }
}

#[test]
fn a_covered_lens_is_dark_and_uniform_with_the_noise_of_a_sensor() {
    let mut random = Noise(3);
    let covered = picture(SIDE, |_, _| [5.0; 3].map(|it| it + random.around(4.0)));
    assert_eq!(flags_of(&covered), [Flag::Dark, Flag::Uniform]);
}

#[test]
fn a_street_at_night_is_not_dark_and_snow_is_not_uniform() {
    let mut random = Noise(5);
    let lamp = |x: usize, y: usize| (x / 12 % 6 == 2) && (y / 12 % 6 == 3);
    let night = picture(SIDE, |x, y| {
        let level = if lamp(x, y) { 220.0 } else { x as f32 / 80.0 };
        [level; 3].map(|it| it + random.around(1.0))
    });
    assert_eq!(flags_of(&night), []);
    let snow = picture(SIDE, |_, _| [127.0 + random.around(127.0); 3]);
    assert_eq!(flags_of(&snow), []);
    let weave = picture(SIDE, |x, y| [60.0 + ((x + y) % 2) as f32 * 100.0; 3]);
    assert_eq!(flags_of(&weave), []);
    let dusk = picture(SIDE, |x, _| [10.0 + x as f32 / 5.0; 3].map(|it| it + random.around(2.0)));
    assert_eq!(flags_of(&dusk), []);
}

#[test]
fn a_picture_that_repeats_a_row_down_to_the_bottom_is_smeared() {
    for from in [40, 112, 160] {
        assert_eq!(flags_of(&damaged(from, <[u8]>::to_vec)), [Flag::Smeared], "from row {from}");
    }
    assert_eq!(flags_of(&damaged(190, <[u8]>::to_vec)), [], "less than a quarter");
}

#[test]
fn a_picture_that_goes_on_in_a_decoders_grey_is_smeared() {
    for grey in [128, 130] {
        let it = damaged(100, |row| vec![grey; row.len()]);
        assert_eq!(flags_of(&it), [Flag::Smeared], "{grey}");
    }
    for colour in [0, 60, 200, 255] {
        assert_eq!(flags_of(&damaged(100, |row| vec![colour; row.len()])), [], "{colour}");
    }
}

#[test]
fn vertical_stripes_are_not_smeared() {
    let stripes = |x: usize, _| [60.0 + (x / 8 % 2) as f32 * 90.0; 3];
    assert_eq!(flags_of(&picture(SIDE, stripes)), []);
    // As in the usual test picture: bars, and other bars below.
    let bars = |x: usize, y: usize| {
        let shift = if 150 < y { 3 } else { 0 };
        let bar = x * 7 / SIDE + shift;
        [bar * 40 % 256, bar * 80 % 256, bar * 130 % 256].map(|it| it as f32)
    };
    assert_eq!(flags_of(&picture(SIDE, bars)), []);
}

#[test]
fn the_mean_is_that_of_the_luma() {
    for (colour, luma) in [([255.0, 0.0, 0.0], 0.299), ([0.0, 255.0, 0.0], 0.587), ([0.0; 3], 0.0)]
    {
        let got = measure(&picture(SIDE, |_, _| colour), SIDE).mean_luma;
        assert!((got - luma).abs() < 1e-3, "{got} is not {luma}");
    }
}

/// A stream on a made clock.
struct Bench {
    tracker: Tracker,
    start: Instant,
    /// What it does at which second.
    heard: Vec<(f32, Vec<Flag>)>,
}

impl Bench {
    fn new(settings: Settings) -> Bench {
        Bench { tracker: Tracker::new(settings), start: Instant::now(), heard: Vec::new() }
    }

    /// One picture at this time, of a stream that has had so many keyframes.
    fn see(&mut self, look: &Look, ms: u32, keyframes: u64) {
        self.see_after(look, ms, keyframes, false);
    }

    fn see_after(&mut self, look: &Look, ms: u32, keyframes: u64, after_corrupt: bool) {
        let since = Duration::from_millis(ms.into());
        let at = Moment {
            epoch: 0,
            pts: since,
            arrived: self.start + since,
            time: SystemTime::UNIX_EPOCH + since,
        };
        if self.tracker.see(&Seen { look, at, keyframes, after_corrupt, gave_way: 0 }) {
            let flags = self.tracker.flags().iter().map(|it| it.0).collect();
            self.heard.push((ms as f32 / 1e3, flags));
        }
    }

    /// Pictures at 10 a second, until the end of this second.
    fn until(&mut self, second: u32, keyframes: impl Fn(u32) -> u64, look: impl Fn(u32) -> Look) {
        let from = self.tracker_ms();
        for ms in (from..second * 1000).step_by(100) {
            self.see(&look(ms), ms, keyframes(ms));
        }
    }

    fn tracker_ms(&self) -> u32 {
        self.heard.last().map_or(0, |it| (it.0 * 1e3) as u32 + 100)
    }
}

fn fine(seed: u32) -> Look {
    measure(&scene(64, 3.0, seed), 64)
}

fn black() -> Look {
    measure(&[0; 64 * 64 * 3], 64)
}

#[test]
fn what_lasts_for_two_seconds_is_raised_and_cleared_a_second_after_it_has_passed() {
    let mut it = Bench::new(Settings::default());
    for ms in (0..10_000).step_by(100) {
        let dark = (1_000..1_900).contains(&ms) || (3_000..6_000).contains(&ms);
        it.see(&if dark { black() } else { fine(ms) }, ms, 0);
    }
    let both = vec![Flag::Dark, Flag::Uniform];
    assert_eq!(it.heard, [(5.0, both), (7.0, vec![])]);
}

#[test]
fn a_flag_holds_since_the_first_picture_that_had_it() {
    let mut it = Bench::new(Settings::default());
    it.until(4, |_| 0, |ms| if ms < 1_000 { fine(ms) } else { black() });
    let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    let all: Vec<_> = it.tracker.flags().iter().collect();
    assert_eq!(all, [(Flag::Dark, since), (Flag::Uniform, since)]);
    it.tracker.reset();
    assert_eq!(it.tracker.flags(), Flags::default());
}

#[test]
fn a_picture_that_stays_the_same_is_frozen_after_its_time_and_at_once_free_again() {
    let mut it = Bench::new(Settings::default());
    it.until(45, |_| 0, |ms| fine(if (5_000..40_000).contains(&ms) { 1 } else { ms }));
    assert_eq!(it.heard, [(35.0, vec![Flag::Frozen]), (40.0, vec![])]);
}

#[test]
fn a_stream_is_frozen_only_after_three_keyframes_more() {
    // One every 20 s: the same picture until the keyframe after the third of them.
    let mut it = Bench::new(Settings::default());
    it.until(100, |ms| 1 + u64::from(ms / 20_000), |_| fine(1));
    assert_eq!(it.heard, [(60.0, vec![Flag::Frozen])]);
    // A still scene that only keyframes change, every 25 s.
    let mut it = Bench::new(Settings::default());
    it.until(600, |ms| 1 + u64::from(ms / 25_000), |ms| fine(1 + ms / 25_000));
    assert_eq!(it.heard, []);
}

#[test]
fn frozen_can_be_off() {
    let mut it = Bench::new(Settings { frozen_after: None, ..Settings::default() });
    it.until(100, |_| 0, |_| fine(1));
    assert_eq!(it.heard, []);
}

#[test]
fn pictures_that_the_decoder_gave_up_are_told_at_once_and_for_five_seconds() {
    let mut it = Bench::new(Settings::default());
    for ms in (0..10_000).step_by(100) {
        it.see_after(&fine(ms), ms, 0, ms == 1_000 || ms == 2_000);
    }
    assert_eq!(it.heard, [(1.0, vec![Flag::Corrupt]), (7.0, vec![])]);
}

#[test]
fn a_file_read_fast_is_judged_by_its_own_time_and_a_live_stream_by_its_arrival() {
    for (by_pts, frozen) in [(true, true), (false, false)] {
        let mut tracker = Tracker::new(Settings { by_pts, ..Settings::default() });
        let (start, look) = (Instant::now(), fine(1));
        for i in 0..100_u32 {
            let at = Moment {
                // The file starts over now and then: that is no time that passes.
                epoch: u64::from(i / 40),
                pts: Duration::from_secs((i % 40).into()),
                arrived: start + Duration::from_millis(i.into()),
                time: SystemTime::UNIX_EPOCH,
            };
            tracker.see(&Seen { look: &look, at, keyframes: 0, after_corrupt: false, gave_way: 0 });
        }
        assert_eq!(tracker.flags().has(Flag::Frozen), frozen);
    }
}

#[test]
fn a_jump_in_a_files_time_is_no_time_that_passes() {
    let mut tracker = Tracker::new(Settings { by_pts: true, ..Settings::default() });
    let (arrived, look) = (Instant::now(), fine(1));
    for (epoch, second) in (0..10).map(|it| (0, it)).chain((1000..1010).map(|it| (1, it))) {
        let pts = Duration::from_secs(second);
        let at = Moment { epoch, pts, arrived, time: SystemTime::UNIX_EPOCH };
        tracker.see(&Seen { look: &look, at, keyframes: 0, after_corrupt: false, gave_way: 0 });
    }
    assert_eq!(tracker.flags(), Flags::default());
}

#[test]
fn noise_alone_keeps_a_still_scene_from_being_the_same() {
    for seed in 1..20 {
        for noise in [1.0, 2.0, 8.0] {
            let [one, other] = [seed, seed + 100].map(|it| measure(&scene(SIDE, noise, it), SIDE));
            assert!(one.same(&one.clone()) && !one.same(&other), "{noise} {seed}");
        }
    }
}

#[test]
fn any_picture_of_any_side_can_be_measured() {
    let mut random = Noise(9);
    for side in (1..70).chain([1024, 4096]) {
        let pixels: Vec<u8> = (0..side * side * 3).map(|_| random.next() as u8).collect();
        let look = measure(&pixels, side);
        assert!((0.0..=1.0).contains(&look.mean_luma), "{side}");
    }
}

#[test]
#[ignore = "a figure, not a promise: cargo test --release --lib -- --ignored measuring --nocapture"]
fn measuring_one_picture_takes_so_long() {
    let pictures: Vec<_> = (1..9).map(|it| scene(SIDE, 5.0, it)).collect();
    let mut times: Vec<_> = (0..4_000)
        .map(|it| {
            let start = Instant::now();
            black_box(measure(black_box(&pictures[it % 8]), SIDE));
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("a picture: median {:?}, p99 {:?}", times[2_000], times[3_960]);
}
