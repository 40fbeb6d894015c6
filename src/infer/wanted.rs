//! What the user wants of the device, as the configuration names it. Says nothing of libtorch.

use std::{fmt, str::FromStr};

/// Which device the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The first GPU if it works, else the CPU with the engine of our own.
    Auto,
    /// The CPU with libtorch, whatever else is there.
    Cpu,
    /// The CPU with the engine of our own, whatever else is there.
    Native,
    /// This GPU, or nothing.
    Cuda(usize),
}

impl Use {
    /// What this build lacks for it, and what to do.
    pub fn lacks(self) -> Option<&'static str> {
        match self {
            Use::Cpu | Use::Cuda(_) if !cfg!(feature = "libtorch") => {
                Some("this build has no libtorch: use auto or native")
            }
            Use::Native if !cfg!(feature = "native") => {
                Some("this build has no engine of our own: use auto or cpu")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Auto => f.write_str("auto"),
            Use::Cpu => f.write_str("cpu"),
            Use::Native => f.write_str("native"),
            Use::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Use {
    type Err = String;

    fn from_str(text: &str) -> Result<Use, String> {
        match text {
            "auto" => Ok(Use::Auto),
            "cpu" => Ok(Use::Cpu),
            "native" => Ok(Use::Native),
            _ => {
                text.strip_prefix("cuda:").and_then(|it| it.parse().ok()).map(Use::Cuda).ok_or_else(
                    || format!("unknown device {text:?}: use auto, cpu, native or cuda:N"),
                )
            }
        }
    }
}

/// How numbers are stored and multiplied. What the user wants is an `Option`: `None` is `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// float32.
    Fp32,
    /// bfloat16.
    Bf16,
    /// float16.
    Fp16,
}

impl Precision {
    /// The name in the configuration and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Bf16 => "bf16",
            Precision::Fp16 => "fp16",
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Precision, String> {
        let all = [Precision::Fp32, Precision::Bf16, Precision::Fp16];
        let found = all.into_iter().find(|it| it.name() == text);
        found.ok_or_else(|| format!("unknown precision {text:?}: use auto, fp32, bf16 or fp16"))
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the user wants of the device.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where.
    pub device: Use,
    /// `None`: f32 on the CPU, half on a GPU if the self-test agrees.
    pub precision: Option<Precision>,
    /// The largest batch, from 1.
    pub max_batch: usize,
    /// The sizes to which batches are padded, in increasing order, the last being `max_batch`;
    /// `None`: powers of two.
    pub buckets: Option<Vec<usize>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_precisions_are_read_by_name() {
        assert_eq!("auto".parse(), Ok(Use::Auto));
        assert_eq!("cpu".parse(), Ok(Use::Cpu));
        assert_eq!("native".parse(), Ok(Use::Native));
        assert_eq!("cuda:3".parse(), Ok(Use::Cuda(3)));
        for name in ["auto", "cpu", "native", "cuda:3"] {
            assert_eq!(name.parse::<Use>().unwrap().to_string(), name);
        }
        for wrong in ["cuda", "cuda:", "cuda:-1", "gpu"] {
            assert!(wrong.parse::<Use>().is_err(), "{wrong}");
        }
        assert_eq!("bf16".parse(), Ok(Precision::Bf16));
        assert!("int8".parse::<Precision>().is_err());
    }
}
