//! Where numbers lie: the channels of a pixel, and the rows of a map.

/// Channels are padded to whole vectors of this many. A vector of 16 takes the last 8 in part.
const PAD: usize = 8;

/// The channels of a pixel: `positions[i]` is the network's channel at place `i`, `None` is
/// padding, which is always 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Channels {
    pub(super) positions: Vec<Option<usize>>,
}

impl Channels {
    /// So many channels and padding.
    pub(super) fn plain(count: usize) -> Channels {
        Channels { positions: part(0, count).collect() }
    }

    /// The two halves of a ghost module, each with its own padding, so that both can be written in
    /// place by vectors.
    pub(super) fn halves(count: usize) -> Channels {
        Channels {
            positions: part(0, count / 2).chain(part(count / 2, count - count / 2)).collect(),
        }
    }

    /// Places per pixel.
    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Where the channels are, in their order, padding left out: offset and length.
    pub(super) fn runs(&self) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (at, position) in self.positions.iter().enumerate() {
            match runs.last_mut() {
                _ if position.is_none() => {}
                Some((first, length)) if *first + *length == at => *length += 1,
                _ => runs.push((at, 1)),
            }
        }
        runs
    }
}

fn part(first: usize, count: usize) -> impl Iterator<Item = Option<usize>> {
    (0..count.next_multiple_of(PAD)).map(move |it| (it < count).then_some(first + it))
}

/// A map of pixels, of which a ring of rows is kept: row `y` lies where row `y + keep` will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) height: usize,
    pub(super) width: usize,
    /// Places per pixel.
    pub(super) channels: usize,
    /// Rows, at most `height`.
    pub(super) keep: usize,
}

impl Map {
    pub(super) fn new(height: usize, width: usize, channels: usize) -> Map {
        Map { height, width, channels, keep: height }
    }

    /// The same, with so many rows in memory.
    pub(super) fn keeping(self, rows: usize) -> Map {
        Map { keep: rows.min(self.height), ..self }
    }

    /// Numbers in memory.
    pub(super) fn len(&self) -> usize {
        self.keep * self.row_len()
    }

    /// Numbers per row.
    pub(super) fn row_len(&self) -> usize {
        self.width * self.channels
    }

    /// Where a row begins.
    pub(super) fn row(&self, y: usize) -> usize {
        y % self.keep * self.row_len()
    }

    /// How many of the rows `from..to` lie one after the other.
    pub(super) fn together(&self, from: usize, to: usize) -> usize {
        (to - from).min(self.keep - from % self.keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_padded_to_vectors_and_found_again() {
        assert_eq!(Channels::plain(16).runs(), [(0, 16)]);
        assert_eq!(Channels::plain(20).len(), 24);
        let halves = Channels::halves(24);
        assert_eq!((halves.len(), halves.runs()), (32, vec![(0, 12), (16, 12)]));
        assert_eq!((halves.positions[11], halves.positions[12]), (Some(11), None));
        assert_eq!((halves.positions[16], halves.positions[31]), (Some(12), None));
        assert_eq!(Channels::halves(32).runs(), [(0, 32)]);
    }

    #[test]
    fn a_map_keeps_a_ring_of_rows() {
        let map = Map::new(9, 2, 3).keeping(4);
        assert_eq!((map.len(), map.row_len(), map.row(3), map.row(4)), (24, 6, 18, 0));
        assert_eq!((map.together(2, 4), map.together(2, 7), map.together(4, 8)), (2, 2, 4));
        assert_eq!(Map::new(3, 2, 3).keeping(4).keep, 3);
    }
}
