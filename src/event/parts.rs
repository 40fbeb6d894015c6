//! Parts of the payloads: counts, times, and what is wrong with pictures.

use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::rfc3339;
use crate::{
    frame::{Meta, Skipped},
    health::{Flag, Flags, Quality, measure::Look},
};

/// Reasons with a count above zero, as an object.
pub(super) struct Counts(pub(super) Skipped);

impl Serialize for Counts {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(reason, count)| (reason.name(), count)))
    }
}

#[derive(Serialize)]
pub(super) struct Latency {
    decode: u64,
    queue: u64,
    preprocess: u64,
    batch_wait: u64,
    inference: u64,
    postprocess: u64,
    total: u64,
}

impl Latency {
    pub(super) fn of(meta: &Meta, handed_over: Instant) -> Latency {
        let at = &meta.timing;
        let micros = |it: Duration| it.as_micros() as u64;
        Latency {
            decode: micros(at.decoded.saturating_duration_since(at.arrived)),
            queue: micros(at.taken.saturating_duration_since(at.decoded)),
            preprocess: micros(at.preprocessed.saturating_duration_since(at.taken)),
            batch_wait: micros(at.started.saturating_duration_since(at.preprocessed)),
            inference: micros(at.inferred.saturating_duration_since(at.started)),
            postprocess: micros(handed_over.saturating_duration_since(at.inferred)),
            total: micros(handed_over.saturating_duration_since(at.arrived)),
        }
    }
}

#[derive(Serialize)]
pub(super) struct QualityData {
    #[serde(skip_serializing_if = "Option::is_none")]
    mean_luma: Option<f64>,
    flags: Vec<&'static str>,
}

impl QualityData {
    pub(super) fn of(quality: &Quality) -> QualityData {
        let luma = |it: &Look| (f64::from(it.mean_luma) * 1e3).round() / 1e3;
        QualityData {
            mean_luma: quality.look.as_ref().map(luma),
            flags: quality.flags.iter().map(|it| it.name()).collect(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct FlagData {
    name: &'static str,
    since: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    effective_fps: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    wanted_fps: Option<f64>,
}

impl FlagData {
    pub(super) fn all(flags: &Flags) -> Vec<FlagData> {
        let one = |(flag, since): (Flag, SystemTime)| {
            let rates = flags.rates().filter(|_| flag == Flag::Degraded);
            FlagData {
                name: flag.name(),
                since: rfc3339(since),
                effective_fps: rates.map(|it| it.effective_mfps as f64 / 1e3),
                wanted_fps: rates.map(|it| it.wanted_mfps as f64 / 1e3),
            }
        };
        flags.iter().map(one).collect()
    }
}
