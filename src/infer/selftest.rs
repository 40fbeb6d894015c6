//! The golden self-test: fixed pictures, the model's logits for them, the logits they should give.
//!
//! The pictures are computed, in integers only, at the checkpoint's input size, so that no file
//! can be lost and `tests/golden/` makes the same ones in Python. Not here: what follows from a
//! mismatch.

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    frame::{Colour, Layout, Matrix, Picture, Planes, Siting},
    infer::Model,
    preprocess::{Geometry, Preprocessor, centre},
};

/// The name of the set that [`pictures`] makes. A new set gets a new name.
pub const PICTURES: &str = "selftest-v1";

/// The logits that the pictures should give. Travels as JSON in a checkpoint's metadata, under
/// `reference`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// What computed them: PyTorch with its version, or `self`.
    pub by: String,
    /// The set of pictures.
    pub pictures: String,
    /// `[pictures][classes]`, computed in f32 on a CPU.
    pub logits: Vec<Vec<f32>>,
}

impl Reference {
    /// Reads the metadata of a checkpoint.
    ///
    /// # Errors
    /// It is not the JSON of a [`Reference`], or it is for other pictures than ours.
    pub fn parse(json: &str) -> anyhow::Result<Reference> {
        let it: Reference = serde_json::from_str(json).context("reference logits")?;
        let (named, given) = (&it.pictures, it.logits.len());
        ensure!(named == PICTURES, "reference logits are for pictures {named}, not {PICTURES}");
        ensure!(given == COUNT, "reference logits are for {given} pictures, not {COUNT}");
        let finite = it.logits.iter().flatten().all(|it| it.is_finite());
        ensure!(finite, "reference logits hold a NaN or an infinity");
        Ok(it)
    }

    /// What a model answers now, as the reference for later.
    ///
    /// # Errors
    /// The model failed.
    pub fn of(model: &mut dyn Model, side: usize) -> anyhow::Result<Reference> {
        Ok(Reference {
            by: "self".into(),
            pictures: PICTURES.into(),
            logits: answers(model, side)?,
        })
    }

    /// The metadata of a checkpoint.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings and finite numbers always have a JSON form")
    }
}

/// How two sets of logits for the same pictures compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// max |difference| / max |reference|, the largest of the pictures; infinite if a logit is
    /// not finite.
    pub max_error: f64,
    /// Pictures whose first label is the same.
    pub same_top1: usize,
    /// All pictures.
    pub pictures: usize,
}

impl Agreement {
    /// Whether every picture's first label is the same.
    pub fn top1(&self) -> bool {
        self.same_top1 == self.pictures
    }
}

/// What a network should answer, and to what: the self-test as it is run at start and, on a lane
/// with nothing to do, again and again.
#[derive(Clone, Debug)]
pub struct Golden {
    /// How a picture becomes the network's input.
    pub geometry: Geometry,
    /// The answers.
    pub reference: Reference,
    /// The largest error that is still good.
    pub allowed_error: f64,
}

impl Golden {
    /// Puts the pictures through preprocess and the model, and compares its answers.
    ///
    /// # Errors
    /// Preprocess refuses or changes a picture, the model failed, or it answers with another number
    /// of classes.
    pub fn run(&self, model: &mut dyn Model) -> anyhow::Result<Agreement> {
        let Geometry { resize, crop } = self.geometry;
        let mut preprocessor = Preprocessor::new(self.geometry);
        let mut inputs = Vec::new();
        for picture in pictures(crop) {
            let mut input = vec![0; self.geometry.bytes()];
            // The resize of a picture that has the size already changes nothing, so the reference
            // holds for the crop out of its middle.
            let framed = framed(&picture, crop, resize);
            let done = preprocessor.run(&framed, &mut input);
            done.map_err(|it| anyhow::anyhow!("preprocess refuses a self-test picture: {it}"))?;
            ensure!(input == picture, "preprocess changes a self-test picture");
            inputs.push(input);
        }
        let batch: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        compare(&model.forward(&batch).context("self-test")?, &self.reference.logits)
    }

    /// Whether the answers are good enough for the precision.
    pub fn passes(&self, agreement: &Agreement) -> bool {
        agreement.top1() && agreement.max_error <= self.allowed_error
    }
}

/// A picture in the middle of a larger, white one.
fn framed(picture: &[u8], side: usize, size: usize) -> Picture {
    let first = centre(size, side);
    let mut bytes = vec![255; size * size * 3];
    for (row, from) in picture.chunks_exact(side * 3).enumerate() {
        let at = ((first + row) * size + first) * 3;
        bytes[at..at + side * 3].copy_from_slice(from);
    }
    Picture {
        layout: Layout::Rgb,
        colour: Colour {
            matrix: Matrix::Bt601,
            full_range: true,
            siting_x: Siting::Centre,
            siting_y: Siting::Centre,
        },
        width: size,
        height: size,
        strides: [size * 3, 0, 0],
        planes: Box::new(Rows(bytes)),
    }
}

struct Rows(Vec<u8>);

impl Planes for Rows {
    fn plane(&self, _index: usize) -> &[u8] {
        &self.0
    }
}

/// The model's logits for the pictures.
///
/// # Errors
/// The model failed.
pub fn answers(model: &mut dyn Model, side: usize) -> anyhow::Result<Vec<Vec<f32>>> {
    let pictures = pictures(side);
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    model.forward(&batch).context("self-test")
}

/// Compares logits with reference logits, picture by picture.
///
/// # Errors
/// They differ in the number of pictures or classes.
pub fn compare(got: &[Vec<f32>], want: &[Vec<f32>]) -> anyhow::Result<Agreement> {
    ensure!(got.len() == want.len(), "{} answers for {} references", got.len(), want.len());
    let mut all = Agreement { max_error: 0.0, same_top1: 0, pictures: want.len() };
    for (got, want) in got.iter().zip(want) {
        ensure!(got.len() == want.len(), "{} logits, the reference has {}", got.len(), want.len());
        all.max_error = all.max_error.max(error(got, want));
        all.same_top1 += usize::from(top1(got) == top1(want));
    }
    Ok(all)
}

fn error(got: &[f32], want: &[f32]) -> f64 {
    if !got.iter().all(|it| it.is_finite()) {
        return f64::INFINITY;
    }
    let differences = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    let scale = want.iter().map(|it| f64::from(it.abs())).fold(f64::MIN_POSITIVE, f64::max);
    differences.fold(0.0, f64::max) / scale
}

fn top1(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
}

const COUNT: usize = 3;

/// Red, green and blue at x and y of a side; the low eight bits count.
type Pattern = fn(u32, u32, u32) -> [u32; 3];

/// The pictures, `[side, side, 3]` each: a gradient, rings, blocks of colour.
pub fn pictures(side: usize) -> Vec<Vec<u8>> {
    let patterns: [Pattern; COUNT] = [gradient, rings, blocks];
    let side = u32::try_from(side).expect("an input is far smaller than 2^32 pixels wide");
    let paint = |pattern: Pattern| {
        let pixels = (0..side).flat_map(move |y| (0..side).map(move |x| (x, y)));
        pixels.flat_map(|(x, y)| pattern(x, y, side).map(|it| (it & 255) as u8)).collect()
    };
    patterns.map(paint).into()
}

fn gradient(x: u32, y: u32, side: u32) -> [u32; 3] {
    [x * 255 / side, y * 255 / side, (x + y) * 255 / (2 * side)]
}

fn rings(x: u32, y: u32, side: u32) -> [u32; 3] {
    let (dx, dy) = ((2 * x).abs_diff(side), (2 * y).abs_diff(side));
    let ring = ((dx * dx + dy * dy) * 4 / side) & 255;
    [ring, 255 - ring, 64 + ring / 2]
}

fn blocks(x: u32, y: u32, side: u32) -> [u32; 3] {
    let cell = |at: u32| at * 9 / side;
    let mixed = (cell(x).wrapping_mul(73_856_093) ^ cell(y).wrapping_mul(19_349_663))
        .wrapping_mul(2_654_435_761);
    [mixed >> 24, mixed >> 16, mixed >> 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with what it was given.
    struct Fixed(Vec<Vec<f32>>);

    impl Model for Fixed {
        fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
            assert_eq!(batch.len(), self.0.len());
            Ok(self.0.clone())
        }
    }

    fn logits() -> Vec<Vec<f32>> {
        vec![vec![1.0, 2.0, -4.0], vec![0.5, 0.25, 0.0], vec![-1.0, -2.0, -3.0]]
    }

    #[test]
    fn the_pictures_never_change() {
        let of = |side: usize| {
            let bytes = pictures(side).concat();
            bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            })
        };
        assert_eq!(pictures(112).iter().map(Vec::len).collect::<Vec<_>>(), [112 * 112 * 3; 3]);
        assert_eq!((of(112), of(224)), (FNV_112, FNV_224));
    }

    const FNV_112: u64 = 0x427f_4125_0486_7887;
    const FNV_224: u64 = 0x29ac_5ad5_0c7b_f0bc;

    #[test]
    fn a_model_agrees_with_its_own_reference() {
        let mut model = Fixed(logits());
        let reference = Reference::of(&mut model, 8).unwrap();
        let again = Reference::parse(&reference.to_json()).unwrap();
        assert_eq!(again, reference);
        for geometry in [(8, 8), (9, 8), (256, 224)] {
            let geometry = Geometry { resize: geometry.0, crop: geometry.1 };
            let golden = Golden { geometry, reference: again.clone(), allowed_error: 0.0 };
            let agreement = golden.run(&mut model).unwrap();
            assert_eq!(agreement, Agreement { max_error: 0.0, same_top1: 3, pictures: 3 });
            assert!(golden.passes(&agreement));
        }
    }

    #[test]
    fn the_error_is_relative_to_the_largest_logit_and_the_worst_picture_counts() {
        let mut off = logits();
        off[0][0] = 3.0;
        let agreement = compare(&off, &logits()).unwrap();
        assert_eq!(agreement, Agreement { max_error: 0.5, same_top1: 2, pictures: 3 });
        assert!(!agreement.top1());
    }

    #[test]
    fn a_nan_is_an_infinite_error() {
        let mut off = logits();
        off[2][1] = f32::NAN;
        assert_eq!(compare(&off, &logits()).unwrap().max_error, f64::INFINITY);
    }

    #[test]
    fn a_reference_that_does_not_fit_is_refused() {
        let check = |json: &str, said: &str| {
            let error = format!("{:#}", Reference::parse(json).unwrap_err());
            assert!(error.contains(said), "{error}");
        };
        check("{", "reference logits: EOF");
        check(r#"{"by":"x","pictures":"selftest-v0","logits":[]}"#, "not selftest-v1");
        check(r#"{"by":"x","pictures":"selftest-v1","logits":[[1]]}"#, "1 pictures, not 3");
        check(
            r#"{"by":"x","pictures":"selftest-v1","logits":[[1],[2],[1e39]]}"#,
            "reference logits",
        );
        let fewer = vec![vec![1.0], vec![1.0], vec![1.0]];
        assert!(compare(&fewer, &logits()).is_err());
        assert!(compare(&fewer[..2], &logits()).is_err());
    }
}
