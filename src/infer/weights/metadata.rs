//! What a checkpoint says of itself: the geometry it was trained for, its reference answers and
//! where it comes from. Kept as strings in the safetensors header.

use std::collections::BTreeMap;

use crate::infer::{
    selftest::Reference,
    weights::{Tensor, error::Problem},
};

/// The only architecture there is.
pub const ARCH: &str = "ghostnet_1x";
/// The tensor whose shape tells the number of classes.
pub const HEAD: &str = "classifier.weight";

/// Sides beyond this are a mistake; preprocess has its own, lower limits.
const SIDE_MAX: usize = 4096;

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Metadata {
    /// The network, by name.
    pub arch: String,
    /// Rows of the last layer, from 1.
    pub num_classes: usize,
    /// The picture's short side is resized to this many pixels.
    pub resize: usize,
    /// Side of the centre crop, the model's input; at most `resize`.
    pub input: usize,
    /// Subtracted from each channel, of 0..=1.
    pub mean: [f32; 3],
    /// Divides each channel then; above 0.
    pub std: [f32; 3],
    /// Hash of the label file that belongs to the checkpoint, in hex.
    pub labels_sha256: Option<String>,
    /// Answers for the golden self-test.
    pub reference: Option<Reference>,
    /// Everything else that the file says, such as where it comes from.
    pub provenance: BTreeMap<String, String>,
}

impl Metadata {
    /// The metadata of a checkpoint that brings none: that of the published GhostNet.
    pub fn published(num_classes: usize) -> Metadata {
        Metadata {
            arch: ARCH.into(),
            num_classes,
            resize: 256,
            input: 224,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            labels_sha256: None,
            reference: None,
            provenance: BTreeMap::new(),
        }
    }

    /// Reads the header's strings. The geometry's four keys stand together or not at all.
    ///
    /// # Errors
    /// [`Problem::Metadata`] if a value cannot be used or contradicts the tensors.
    pub fn parse(
        mut strings: BTreeMap<String, String>,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Metadata, Problem> {
        let mut take = |key: &str| strings.remove(key);
        let rows = tensors.get(HEAD).filter(|it| it.shape.len() == 2).map(|it| it.shape[0]);
        let num_classes = match take("num_classes") {
            Some(text) => whole("num_classes", &text)?,
            None => rows.unwrap_or(0),
        };
        if num_classes == 0 {
            let what =
                format!("it is not given, and no tensor `{HEAD}` of two dimensions tells it");
            return Err(Problem::metadata("num_classes", what));
        }
        if rows.is_some_and(|rows| rows != num_classes) {
            let what = format!("{num_classes}, but `{HEAD}` has {} rows", rows.unwrap_or(0));
            return Err(Problem::metadata("num_classes", what));
        }
        let mut metadata = Metadata::published(num_classes);
        if let Some(arch) = take("arch") {
            metadata.arch = arch;
        }
        let geometry = ["resize", "input", "mean", "std"].map(|key| (key, take(key)));
        if geometry.iter().any(|it| it.1.is_some()) {
            metadata.set_geometry(geometry)?;
        }
        metadata.labels_sha256 = take("labels_sha256");
        if let Some(hash) = &metadata.labels_sha256
            && (hash.len() != 64 || !hash.bytes().all(|it| it.is_ascii_hexdigit()))
        {
            return Err(Problem::metadata("labels_sha256", "it is not 64 hex digits"));
        }
        if let Some(text) = take("reference") {
            metadata.reference = Some(reference(&text, num_classes)?);
        }
        take("format");
        metadata.provenance = strings;
        Ok(metadata)
    }

    /// The header's strings. A provenance that uses one of our own keys is left out.
    pub fn strings(&self) -> BTreeMap<String, String> {
        let mut strings = self.provenance.clone();
        strings.insert("format".into(), "pt".into());
        strings.insert("arch".into(), self.arch.clone());
        strings.insert("num_classes".into(), self.num_classes.to_string());
        strings.insert("resize".into(), self.resize.to_string());
        strings.insert("input".into(), self.input.to_string());
        strings.insert("mean".into(), self.mean.map(|it| it.to_string()).join(","));
        strings.insert("std".into(), self.std.map(|it| it.to_string()).join(","));
        let hash = self.labels_sha256.as_ref().map(|it| ("labels_sha256".into(), it.clone()));
        strings.extend(hash);
        if let Some(reference) = &self.reference {
            strings.insert("reference".into(), reference.to_json());
        }
        strings
    }

    fn set_geometry(&mut self, geometry: [(&str, Option<String>); 4]) -> Result<(), Problem> {
        for (key, text) in geometry {
            let text = text.ok_or_else(|| {
                Problem::metadata(key, "it is not given, though other parts of the geometry are")
            })?;
            match key {
                "resize" => self.resize = whole(key, &text)?,
                "input" => self.input = whole(key, &text)?,
                "mean" => self.mean = triple(key, &text)?,
                _ => self.std = triple(key, &text)?,
            }
        }
        if SIDE_MAX < self.resize || self.resize < self.input || self.input == 0 {
            let what = format!(
                "{}, with resize {}; needed is 1 <= input <= resize <= {SIDE_MAX}",
                self.input, self.resize
            );
            return Err(Problem::metadata("input", what));
        }
        if !self.std.iter().all(|it| 0.0 < *it) {
            return Err(Problem::metadata("std", "it divides, so each must be above 0"));
        }
        Ok(())
    }
}

fn whole(key: &str, text: &str) -> Result<usize, Problem> {
    text.trim().parse().map_err(|_| Problem::metadata(key, "it is not a whole number"))
}

fn triple(key: &str, text: &str) -> Result<[f32; 3], Problem> {
    let parts: Result<Vec<f32>, _> = text.split(',').map(|it| it.trim().parse()).collect();
    parts
        .ok()
        .and_then(|it| <[f32; 3]>::try_from(it).ok())
        .filter(|it| it.iter().all(|it| it.is_finite()))
        .ok_or_else(|| Problem::metadata(key, "it is not three numbers with commas between"))
}

fn reference(text: &str, classes: usize) -> Result<Reference, Problem> {
    let refuse = |what: String| Problem::metadata("reference", what);
    let reference = Reference::parse(text).map_err(|it| refuse(format!("{it:#}")))?;
    match reference.logits.iter().find(|it| it.len() != classes) {
        Some(row) => Err(refuse(format!("{} logits, but {classes} classes", row.len()))),
        None => Ok(reference),
    }
}
