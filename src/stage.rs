//! What stages have in common: their names, and the closed set of reasons to drop a frame.

/// A stage, as the metrics name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StageName {
    /// Decoding and sampling.
    Source,
    /// The frame edge between a source and the batcher.
    Queue,
    /// Picture to model input.
    Preprocess,
    /// The network.
    Inference,
    /// Logits to labels.
    Postprocess,
    /// The journal writer.
    Journal,
}

impl StageName {
    /// Every stage, in the order of the pipeline.
    pub const ALL: [StageName; 6] = [
        StageName::Source,
        StageName::Queue,
        StageName::Preprocess,
        StageName::Inference,
        StageName::Postprocess,
        StageName::Journal,
    ];

    /// The metric label.
    pub fn name(self) -> &'static str {
        match self {
            StageName::Source => "source",
            StageName::Queue => "queue",
            StageName::Preprocess => "preprocess",
            StageName::Inference => "inference",
            StageName::Postprocess => "postprocess",
            StageName::Journal => "journal",
        }
    }
}

/// Why a decoded frame got no label. Each is a metric label, so the set stays small and closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// Left out on purpose: the stream's `max_fps`.
    Rate,
    /// A newer frame took its place before the device was free.
    Overload,
    /// It had waited too long.
    Stale,
    /// The decoder marked the picture as broken, or something is wrong with it and the stream's
    /// bad pictures are not labelled.
    Corrupt,
    /// The journal could not take it.
    Journal,
    /// The daemon was stopping.
    Shutdown,
    /// It could not be read or classified.
    Error,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 7] = [
        Reason::Rate,
        Reason::Overload,
        Reason::Stale,
        Reason::Corrupt,
        Reason::Journal,
        Reason::Shutdown,
        Reason::Error,
    ];

    /// The name in events and the metric label.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Rate => "rate",
            Reason::Overload => "overload",
            Reason::Stale => "stale",
            Reason::Corrupt => "corrupt",
            Reason::Journal => "journal",
            Reason::Shutdown => "shutdown",
            Reason::Error => "error",
        }
    }
}

/// Why one frame was given up. Logged at debug; counted as [`Reason::Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// The picture's planes are smaller than its size says.
    #[error("the picture's buffer is smaller than its size says")]
    BadShape,
    /// The picture is empty or beyond what can be resized.
    #[error("the picture is empty or too large to be resized")]
    BadSize,
    /// A score is not a finite number.
    #[error("a score is not finite")]
    NotFinite,
}
