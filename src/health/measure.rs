//! What one model input looks like, in one pass over its bytes.
//!
//! All loops over bytes are plain sums that the compiler turns into vector instructions: on the
//! 224x224 input this takes a small part of what resizing the picture has cost.

/// The picture is looked at in at most so many rows and columns of cells.
const CELLS: usize = 32;

/// The fixed point of a cell's luma: this many steps to a level of 0..=255.
const STEPS: u32 = 64;

/// Two pictures are the same if their cells differ by no more than this on average, in steps: 0.025
/// levels. Measured on a still scene at 1920x1080 with half a level of noise, encoded by x264 at CRF
/// 18 to 38: what changes within three keyframes is 0.037 or more. The same scene without noise
/// gives 0 at a constant quality, and 0.016 to 0.024 at 4 Mbit/s, where rate control re-encodes it
/// each time anew. With fewer bits that alone is more than the noise of a good camera, and cannot
/// be told from it: such a stream is not called frozen.
const SAME: (u64, u64) = (16, 10);

/// How much something holds: between `Yes` and `No` nothing is raised and nothing cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Degree {
    /// It holds.
    Yes,
    /// It nearly holds.
    Near,
    /// It does not.
    No,
}

impl Degree {
    fn new(holds: impl Fn(f32) -> bool) -> Degree {
        if holds(1.0) {
            Degree::Yes
        } else if holds(NEAR) {
            Degree::Near
        } else {
            Degree::No
        }
    }
}

/// What nearly holds does with limits that are this much wider.
const NEAR: f32 = 1.5;

/// What was measured in one picture.
#[derive(Clone, Debug)]
pub struct Look {
    /// The mean luma, 0.0..=1.0.
    pub mean_luma: f32,
    /// Whether it is almost black, all of it.
    pub dark: Degree,
    /// Whether it is one colour, all of it.
    pub uniform: Degree,
    /// Whether its lower part repeats one row, or is a decoder's grey.
    pub smeared: Degree,
    /// The luma of each cell, in [`STEPS`].
    cells: Box<[u16]>,
}

impl Look {
    /// Whether two pictures are the same, but for what encoding one picture twice changes.
    pub fn same(&self, other: &Look) -> bool {
        let difference = |it: (&u16, &u16)| u64::from(it.0.abs_diff(*it.1));
        let sum: u64 = self.cells.iter().zip(&other.cells).map(difference).sum();
        self.cells.len() == other.cells.len() && sum * SAME.1 <= SAME.0 * self.cells.len() as u64
    }
}

/// One row of cells.
#[derive(Clone, Copy, Debug, Default)]
struct Band {
    /// Mean difference of neighbours in a row, in levels.
    across: f32,
    /// Mean difference to the row above.
    down: f32,
    /// Mean red, green and blue.
    mean: [f32; 3],
}

/// Measures a model input: `[side, side, 3]`, RGB.
///
/// # Panics
/// If `pixels` has another length, or `side` is 0.
pub fn measure(pixels: &[u8], side: usize) -> Look {
    assert!(0 < side && pixels.len() == side * side * 3, "a model input has its size");
    let count = side.min(CELLS);
    let edge = |it: usize| it * side / count;
    let mut bands = [Band::default(); CELLS];
    let bands = &mut bands[..count];
    let mut colours = Vec::with_capacity(count * count);
    let mut columns = vec![0_u16; side * 3];
    for (index, band) in bands.iter_mut().enumerate() {
        let rows = edge(index)..edge(index + 1);
        let height = rows.len();
        let (across, down) = add_rows(pixels, rows.clone(), &mut columns);
        let all = |it: usize| it.max(1) as f32;
        // The first row of the picture has none above.
        let above = height - usize::from(index == 0);
        band.across = across as f32 / all(height * (side - 1) * 3);
        band.down = down as f32 / all(above * side * 3);
        for column in 0..count {
            let (from, to) = (edge(column), edge(column + 1));
            let mut sums = [0_u32; 3];
            for pixel in columns[from * 3..to * 3].chunks_exact(3) {
                sums = [0, 1, 2].map(|it| sums[it] + u32::from(pixel[it]));
            }
            let pixels = (height * (to - from)) as f32;
            let colour = sums.map(|it| it as f32 / pixels);
            band.mean = [0, 1, 2].map(|it| band.mean[it] + colour[it] / count as f32);
            colours.push(colour);
        }
    }
    let luma = |it: &[f32; 3]| 0.299 * it[0] + 0.587 * it[1] + 0.114 * it[2];
    let cells: Box<[u16]> =
        colours.iter().map(|it| (luma(it) * STEPS as f32).round() as u16).collect();
    let sum: u64 = cells.iter().map(|it| u64::from(*it)).sum();
    let mean = sum as f32 / (cells.len() as f32 * STEPS as f32);
    Look {
        mean_luma: (mean / 255.0).min(1.0),
        dark: dark(mean, &cells),
        uniform: uniform(&colours, bands),
        smeared: smeared(bands),
        cells,
    }
}

/// Sets `columns` to the sums of these rows; gives the sums of what neighbours and rows differ by.
fn add_rows(pixels: &[u8], rows: std::ops::Range<usize>, columns: &mut [u16]) -> (u64, u64) {
    let pitch = columns.len();
    let row = |it: usize| &pixels[it * pitch..][..pitch];
    let (mut across, mut down) = (0, 0);
    columns.fill(0);
    for y in rows {
        let line = row(y);
        for (sum, byte) in columns.iter_mut().zip(line) {
            *sum += u16::from(*byte);
        }
        across += difference(&line[3..], &line[..pitch - 3]);
        if 0 < y {
            down += difference(line, row(y - 1));
        }
    }
    (across, down)
}

fn difference(a: &[u8], b: &[u8]) -> u64 {
    // A row has at most 3 x 4096 bytes, so the sum fits.
    let sum: u32 = a.iter().zip(b).map(|it| u32::from(it.0.abs_diff(*it.1))).sum();
    u64::from(sum)
}

/// The mean is that of a covered lens, and nothing shines: a street at night has its lamps.
fn dark(mean: f32, cells: &[u16]) -> Degree {
    Degree::new(|wider| {
        let bright = (48.0 * wider * STEPS as f32) as u16;
        let lamps = cells.iter().filter(|it| bright < **it).count();
        mean < 12.0 * wider && lamps * 100 <= cells.len()
    })
}

/// All cells have one colour, and inside them there is nothing but noise.
fn uniform(colours: &[[f32; 3]], bands: &[Band]) -> Degree {
    let count = colours.len() as f32;
    let spread = |channel: usize| {
        let mean = colours.iter().map(|it| it[channel]).sum::<f32>() / count;
        let square = |it: &[f32; 3]| (it[channel] - mean) * (it[channel] - mean);
        (colours.iter().map(square).sum::<f32>() / count).sqrt()
    };
    let spread = [0, 1, 2].map(spread).into_iter().fold(0.0, f32::max);
    let detail = bands.iter().map(|it| it.across + it.down).sum::<f32>() / bands.len() as f32;
    Degree::new(|wider| spread < 1.5 * wider && detail < 6.0 * wider)
}

/// From some row on to the bottom, a quarter of the picture or more, each row equals the one above
/// though there is something in it, or all is a decoder's grey; and above that there is a picture.
/// Without the last, vertical stripes would do.
fn smeared(bands: &[Band]) -> Degree {
    let repeated = |it: &Band| 2.0 <= it.across && it.down <= (it.across / 8.0).min(1.0);
    let grey = |it: &Band| {
        let level = |it: f32| (118.0..=140.0).contains(&it);
        let neutral = it.mean.iter().all(|at| (at - it.mean[0]).abs() <= 4.0);
        it.across <= 0.7 && it.down <= 0.7 && it.mean.iter().all(|it| level(*it)) && neutral
    };
    let run = |holds: &dyn Fn(&Band) -> bool| bands.iter().rev().take_while(|it| holds(it)).count();
    let longest = run(&repeated).max(run(&grey));
    let above = &bands[..bands.len() - longest];
    let pictured = above.iter().filter(|it| 1.0 <= it.down).count();
    let holds = bands.len() <= longest * 4 && above.len() <= pictured * 4 && !above.is_empty();
    if holds { Degree::Yes } else { Degree::No }
}
