//! Passes over a map: means, factors and sums of channels.
//!
//! These move memory and hardly compute: one load, one operation, one store per vector, channels of
//! one pixel at a time.

use crate::infer::native::kernel_vector::{Isa, Plain, Vector, dispatch};
#[cfg(target_arch = "x86_64")]
use crate::infer::native::kernel_vector::{V8, V16};

/// The mean of each channel over all pixels of a map without gaps, `[pixels][means.len()]`.
pub(super) fn means(isa: Isa, x: &[f32], means: &mut [f32]) {
    assert!(!x.is_empty() && x.len().is_multiple_of(means.len()), "the map is whole pixels");
    let args = Args {
        x: x.as_ptr(),
        x_stride: means.len(),
        pixels: x.len() / means.len(),
        y: means.as_mut_ptr(),
        y_stride: 0,
        channels: means.len(),
        other: std::ptr::null(),
    };
    // SAFETY: an `Isa` is used only where it is available, and the sizes are asserted above.
    unsafe { means_with(isa, args) }
}

/// Multiplies each channel of a map without gaps with its factor.
pub(super) fn scale(isa: Isa, x: &mut [f32], factors: &[f32]) {
    assert!(x.len().is_multiple_of(factors.len()), "the map is whole pixels");
    let (pixels, y) = (x.len() / factors.len(), x.as_mut_ptr());
    let args = Args {
        x: y.cast_const(),
        x_stride: factors.len(),
        pixels,
        y,
        y_stride: factors.len(),
        channels: factors.len(),
        other: factors.as_ptr(),
    };
    // SAFETY: an `Isa` is used only where it is available, and the sizes are asserted above.
    unsafe { scale_with(isa, args) }
}

/// `y = x + other` for the first `channels` of `pixels`; `other` has the stride of `y`, and is `y`
/// where it is `None`.
pub(super) fn add(
    isa: Isa,
    (x, x_stride): (&[f32], usize),
    other: Option<&[f32]>,
    (y, y_stride): (&mut [f32], usize),
    (pixels, channels): (usize, usize),
) {
    let Some(last) = pixels.checked_sub(1) else { return };
    let written = last * y_stride + channels;
    assert!(last * x_stride + channels <= x.len() && written <= y.len(), "all pixels are there");
    assert!(other.is_none_or(|it| written <= it.len()), "what is added is there");
    let y = y.as_mut_ptr();
    let args = Args {
        x: x.as_ptr(),
        x_stride,
        pixels,
        y,
        y_stride,
        channels,
        other: other.map_or(y.cast_const(), <[f32]>::as_ptr),
    };
    // SAFETY: an `Isa` is used only where it is available, and the sizes are asserted above.
    unsafe { add_with(isa, args) }
}

#[derive(Clone, Copy)]
struct Args {
    x: *const f32,
    x_stride: usize,
    pixels: usize,
    y: *mut f32,
    y_stride: usize,
    channels: usize,
    other: *const f32,
}

dispatch! { means_with(args: Args) = mean_of_channels }
dispatch! { scale_with(args: Args) = scale_channels }
dispatch! { add_with(args: Args) = add_channels }

#[inline(always)]
unsafe fn mean_of_channels<V: Vector>(args: Args) {
    let share = 1.0 / args.pixels as f32;
    for first in (0..args.channels).step_by(V::WIDTH) {
        let count = V::WIDTH.min(args.channels - first);
        // SAFETY: the caller's.
        unsafe {
            // Four sums, so that an addition need not wait for the one before.
            let mut sums = [V::splat(0.0); 4];
            for pixel in 0..args.pixels {
                let x = load::<V>(args.x.add(pixel * args.x_stride + first), count);
                sums[pixel % 4] = sums[pixel % 4].add(x);
            }
            let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).mul(V::splat(share));
            store(sum, args.y.add(first), count);
        }
    }
}

#[inline(always)]
unsafe fn scale_channels<V: Vector>(args: Args) {
    for pixel in 0..args.pixels {
        for first in (0..args.channels).step_by(V::WIDTH) {
            let count = V::WIDTH.min(args.channels - first);
            // SAFETY: the caller's.
            unsafe {
                let x = load::<V>(args.x.add(pixel * args.x_stride + first), count);
                let factor = load::<V>(args.other.add(first), count);
                store(x.mul(factor), args.y.add(pixel * args.y_stride + first), count);
            }
        }
    }
}

#[inline(always)]
unsafe fn add_channels<V: Vector>(args: Args) {
    for pixel in 0..args.pixels {
        for first in (0..args.channels).step_by(V::WIDTH) {
            let count = V::WIDTH.min(args.channels - first);
            // SAFETY: the caller's.
            unsafe {
                let x = load::<V>(args.x.add(pixel * args.x_stride + first), count);
                let other = load::<V>(args.other.add(pixel * args.y_stride + first), count);
                store(x.add(other), args.y.add(pixel * args.y_stride + first), count);
            }
        }
    }
}

#[inline(always)]
unsafe fn load<V: Vector>(from: *const f32, count: usize) -> V {
    // SAFETY: the caller's.
    unsafe { if count == V::WIDTH { V::load(from) } else { V::load_part(from, count) } }
}

#[inline(always)]
unsafe fn store<V: Vector>(value: V, to: *mut f32, count: usize) {
    // SAFETY: the caller's.
    unsafe { if count == V::WIDTH { value.store(to) } else { value.store_part(to, count) } }
}
