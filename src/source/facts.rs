//! What a connection shows of its stream on the way in, for whoever asks what a camera sends. Pure.

use std::time::Duration;

/// What is known of one connection so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// How the data travels; `None` before it is agreed upon.
    pub carried: Option<Carried>,
    /// What the server calls itself in its description of the stream.
    pub server: Option<String>,
    /// The codec, as people call it; `raw` if there is none.
    pub codec: Option<String>,
    /// The profile and level of the codec, as far as it has them.
    pub profile: Option<String>,
    /// See [`Facts::profile`].
    pub level: Option<String>,
    /// Pictures per second that the stream announces.
    pub announced_fps: Option<f64>,
    /// The decoder. `None` for raw pictures.
    pub decoder: Option<Chosen>,
    /// Encoded pictures.
    pub pictures: u64,
    /// Encoded pictures that need no other.
    pub keyframes: u64,
    /// The longest distance of two keyframes: in pictures, and in the stream's own time if it has
    /// one. `None` before the second.
    pub keyframe_interval: Option<(u64, Option<Duration>)>,
    /// Whether pictures came in another order than they are shown in.
    pub reordered: bool,
    last_keyframe: Option<(u64, Option<Duration>)>,
    latest: Option<Duration>,
}

/// How a stream's data travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// Inside the connection.
    Tcp,
    /// As datagrams.
    Udp,
}

/// A decoder, and why this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The element's name.
    pub name: String,
    /// Why it was chosen.
    pub why: String,
    /// Whether a device decodes.
    pub hardware: bool,
}

impl Facts {
    /// An encoded picture has come.
    pub fn picture(&mut self, pts: Option<Duration>, keyframe: bool) {
        if keyframe {
            if let Some((number, at)) = self.last_keyframe {
                let distance = self.pictures - number;
                let time = pts.zip(at).and_then(|(now, before)| now.checked_sub(before));
                let longest = self.keyframe_interval.map_or(0, |it| it.0);
                if longest < distance {
                    self.keyframe_interval = Some((distance, time));
                }
            }
            self.last_keyframe = Some((self.pictures, pts));
            self.keyframes += 1;
        }
        self.reordered |= pts.is_some() && pts < self.latest;
        self.latest = self.latest.max(pts);
        self.pictures += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(pictures: &[(u64, bool)]) -> Facts {
        let mut facts = Facts::default();
        for (ms, keyframe) in pictures {
            facts.picture(Some(Duration::from_millis(*ms)), *keyframe);
        }
        facts
    }

    #[test]
    fn the_longest_keyframe_interval_counts_and_one_keyframe_makes_none() {
        let it = facts(&[(0, true), (40, false), (80, false)]);
        assert_eq!((it.pictures, it.keyframes, it.keyframe_interval), (3, 1, None));
        let it =
            facts(&[(0, true), (40, true), (80, false), (120, false), (160, true), (200, true)]);
        assert_eq!(it.keyframe_interval, Some((3, Some(Duration::from_millis(120)))));
        let mut it = Facts::default();
        (0..3).for_each(|_| it.picture(None, true));
        assert_eq!(it.keyframe_interval, Some((1, None)));
    }

    #[test]
    fn pictures_that_are_shown_before_earlier_ones_are_noticed() {
        assert!(!facts(&[(0, true), (40, false), (40, false)]).reordered);
        assert!(facts(&[(0, true), (120, false), (40, false)]).reordered);
    }
}
