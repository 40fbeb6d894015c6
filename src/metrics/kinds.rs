//! The closed sets of label values that have no owner elsewhere.

use std::time::Instant;

use crate::frame::Timing;

/// Makes an enum whose variants are label values.
macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $variant:ident = $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$about])* $variant,)* }

        impl $name {
            /// Every one.
            pub const ALL: [$name; [$($label),*].len()] = [$($name::$variant),*];

            /// The label.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $label,)* }
            }
        }
    };
}

labels! {
    /// A part of a frame's way.
    Step {
        /// In the decoder.
        Decode = "decode",
        /// On the frame edge.
        Queue = "queue",
        /// From picture to model input.
        Preprocess = "preprocess",
        /// Ready, while the batch fills or the device is busy.
        BatchWait = "batch_wait",
        /// On the device.
        Inference = "inference",
        /// From logits to labels.
        Postprocess = "postprocess",
        /// Until the event is committed.
        Append = "append",
    }
}

impl Step {
    /// When a frame entered and left this part.
    pub(crate) fn moments(
        self,
        timing: &Timing,
        labelled: Instant,
        committed: Instant,
    ) -> (Instant, Instant) {
        match self {
            Step::Decode => (timing.arrived, timing.decoded),
            Step::Queue => (timing.decoded, timing.taken),
            Step::Preprocess => (timing.taken, timing.preprocessed),
            Step::BatchWait => (timing.preprocessed, timing.started),
            Step::Inference => (timing.started, timing.inferred),
            Step::Postprocess => (timing.inferred, labelled),
            Step::Append => (labelled, committed),
        }
    }
}

labels! {
    /// What the model failed of.
    InferenceError {
        /// The device has no memory left.
        OutOfMemory = "oom",
        /// A logit is not a finite number.
        NotFinite = "nan",
        /// The device failed.
        Device = "device",
        /// Anything else.
        Other = "other",
    }
}

impl InferenceError {
    /// The kind of a model's error, by what libtorch and CUDA write into it.
    pub fn of(error: &anyhow::Error) -> InferenceError {
        let text = format!("{error:#}").to_lowercase();
        let says = |words: &[&str]| words.iter().any(|it| text.contains(it));
        if says(&["out of memory", "can't allocate memory"]) {
            InferenceError::OutOfMemory
        } else if says(&["not finite", "nan "]) {
            InferenceError::NotFinite
        } else if says(&["cuda error", "cudnn", "cublas", "device lost", "nvrtc"]) {
            InferenceError::Device
        } else {
            InferenceError::Other
        }
    }
}

labels! {
    /// How an event was lost to readers of the journal.
    JournalLoss {
        /// It was the oldest, and the journal keeps only so much.
        Retention = "retention",
        /// The journal was damaged, or it was removed.
        Corruption = "corruption",
        /// There was no space for it.
        DiskFull = "disk_full",
    }
}

labels! {
    /// Why a GPU that is there cannot be used.
    GpuTrouble {
        /// No driver is loaded.
        NoDriver = "no_driver",
        /// There is a driver, but its device cannot be opened.
        NoDevice = "no_device",
        /// The CUDA libraries are not there.
        NoLibraries = "no_libraries",
        /// The driver is too old for the CUDA libraries, or these find no device.
        NotFound = "not_found",
        /// A computation on it failed.
        Failed = "failed",
        /// Anything else.
        Other = "other",
    }
}

impl GpuTrouble {
    /// The kind of a reason as `infer::device` words it.
    pub fn of(reason: &str) -> GpuTrouble {
        let kinds = [
            ("has no NVIDIA driver", GpuTrouble::NoDriver),
            ("no /dev/nvidia", GpuTrouble::NoDevice),
            ("needs the CUDA libraries", GpuTrouble::NoLibraries),
            ("finds no usable device", GpuTrouble::NotFound),
            ("convolution on the first device", GpuTrouble::Failed),
        ];
        kinds.into_iter().find(|it| reason.contains(it.0)).map_or(GpuTrouble::Other, |it| it.1)
    }
}

labels! {
    /// What an HTTP request asks for; everything that is not there is [`Route::Other`].
    Route {
        /// `/metrics`.
        Metrics = "metrics",
        /// `/livez`.
        Livez = "livez",
        /// `/readyz`.
        Readyz = "readyz",
        /// Anything else.
        Other = "other",
    }
}

labels! {
    /// How an HTTP request asks.
    Method {
        /// With GET.
        Get = "get",
        /// With HEAD.
        Head = "head",
        /// With anything else; refused.
        Other = "other",
    }
}

/// The label of a status code that we answer with.
pub(crate) fn code(code: u16) -> &'static str {
    match code {
        200 => "200",
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        405 => "405",
        413 => "413",
        500 => "500",
        503 => "503",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn the_reasons_of_an_unusable_gpu_are_told_apart() {
        let check = |reason: &str, kind| assert_eq!(GpuTrouble::of(reason), kind, "{reason}");
        check("GPU 0000:01:00.0 has no NVIDIA driver loaded: …", GpuTrouble::NoDriver);
        check("GPU 0000:01:00.0 has a driver but no /dev/nvidia0: …", GpuTrouble::NoDevice);
        check("GPU 0 needs the CUDA libraries, not in /opt: …", GpuTrouble::NoLibraries);
        check("libtorch finds no usable device: the driver may be …", GpuTrouble::NotFound);
        check("a convolution on the first device failed: …", GpuTrouble::Failed);
        check("the moon is full", GpuTrouble::Other);
    }

    #[test]
    fn the_errors_of_a_model_are_told_apart() {
        let check = |text: &'static str, kind| {
            assert_eq!(InferenceError::of(&anyhow!(text).context("batch of 3")), kind, "{text}");
        };
        check("CUDA out of memory. Tried to allocate 2 GiB", InferenceError::OutOfMemory);
        check("CUDA error: an illegal memory access was encountered", InferenceError::Device);
        check("a score is not finite", InferenceError::NotFinite);
        check("shapes differ", InferenceError::Other);
    }
}
