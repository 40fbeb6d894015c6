//! The element types that tensors are read from, and the sizes of shapes.

use crate::infer::weights::error::{Problem, shown};

/// The type of a tensor's elements in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 single.
    F32,
    /// IEEE 754 double.
    F64,
    /// IEEE 754 half.
    F16,
    /// The upper half of a single.
    Bf16,
    /// Integers: only for counters, whose values are not used.
    I64,
}

/// Dimensions that a tensor may have; a convolution has four.
pub const DIMENSIONS_MAX: usize = 8;

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// Little-endian elements as float32; `None` iff the type is an integer. Surplus bytes that do
    /// not fill an element are left out.
    pub fn decode(self, bytes: &[u8]) -> Option<Vec<f32>> {
        Some(match self {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|it| f32::from_le_bytes(*it)).collect(),
            Dtype::F64 => {
                bytes.as_chunks().0.iter().map(|it| f64::from_le_bytes(*it) as f32).collect()
            }
            Dtype::F16 => {
                bytes.as_chunks().0.iter().map(|it| half(u16::from_le_bytes(*it))).collect()
            }
            Dtype::Bf16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|it| f32::from_bits(u32::from(u16::from_le_bytes(*it)) << 16))
                .collect(),
            Dtype::I64 => return None,
        })
    }
}

/// Elements of a shape.
///
/// # Errors
/// [`Problem::Layout`] if there are too many dimensions or elements to count.
pub fn elements(name: &str, shape: &[usize]) -> Result<usize, Problem> {
    if DIMENSIONS_MAX < shape.len() {
        return Err(Problem::layout(
            name,
            format!("{} dimensions, the limit is {DIMENSIONS_MAX}", shape.len()),
        ));
    }
    // A zero further right must not hide an overflow further left, so zeros are looked for first.
    if shape.contains(&0) {
        return Ok(0);
    }
    shape
        .iter()
        .try_fold(1_usize, |product, it| product.checked_mul(*it))
        .ok_or_else(|| Problem::layout(name, format!("shape {shape:?} has too many elements")))
}

/// Whether a tensor is BatchNorm's counter of training steps, which inference does not use.
pub fn is_counter(name: &str) -> bool {
    name.rsplit('.').next() == Some("num_batches_tracked")
}

/// The refusal of an integer tensor that is no counter.
pub fn refuse_dtype(name: &str, dtype: &str) -> Problem {
    Problem::Dtype { name: shown(name), dtype: shown(dtype) }
}

/// IEEE 754 half to single, exact.
fn half(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let fraction = u32::from(bits) & 0x3ff;
    match exponent {
        // Subnormal halves are multiples of 2^-24, which a single holds exactly.
        0 => {
            let magnitude = fraction as f32 * (-24_f32).exp2();
            if sign == 0 { magnitude } else { -magnitude }
        }
        0x1f => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_become_the_same_numbers() {
        let rows = [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x8001, -5.960_464_5e-8),
            (0x0400, 6.103_515_6e-5),
            (0x3555, 0.333_251_95),
            (0x7c00, f32::INFINITY),
        ];
        for (bits, value) in rows {
            assert_eq!(half(bits), value, "{bits:#x}");
        }
        assert!(half(0x7e00).is_nan());
        assert!(half(0x8000).is_sign_negative());
    }

    #[test]
    fn a_shape_that_overflows_is_refused_even_beside_a_zero_free_tail() {
        assert_eq!(elements("w", &[2, 3, 4]), Ok(24));
        assert_eq!(elements("w", &[]), Ok(1));
        assert_eq!(elements("w", &[usize::MAX, 0]), Ok(0));
        assert!(elements("w", &[usize::MAX, 2]).is_err());
        assert!(elements("w", &[1; 9]).is_err());
    }
}
