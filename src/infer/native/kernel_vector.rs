//! One vector of f32 on each instruction set: the words in which the kernels are written.
//!
//! [`Vector`] has one implementation per instruction set, so that a kernel is one generic text.
//! Its functions are always inlined: they become instructions only inside a function that enables
//! the instruction set, see [`dispatch`]. The portable vector is an array, which compilers turn
//! into what every processor of the architecture has; it is the oracle of the tests.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Which instructions the kernels use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every processor of the architecture has.
    Portable,
    /// AVX2 with FMA: vectors of 8.
    Avx2,
    /// AVX-512F: vectors of 16.
    Avx512,
}

impl Isa {
    /// The fastest first.
    pub const ALL: [Isa; 3] = [Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// Whether this processor has the instructions.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
        }
    }

    /// The fastest that this processor has, of those that were run: no processor with AVX-512 has run the
    /// tests yet, and a daemon must not be the first.
    pub fn best() -> Isa {
        let was_run = |it: &Isa| *it != Isa::Avx512 && it.available();
        Isa::ALL.into_iter().find(was_run).unwrap_or(Isa::Portable)
    }

    /// How many f32 a vector holds.
    pub(super) fn width(self) -> usize {
        if self == Isa::Avx512 { 16 } else { 8 }
    }
}

/// A vector of [`Vector::WIDTH`] f32.
///
/// # Safety of the functions
///
/// The instruction set is enabled in the function into which they are inlined, and what a pointer
/// points to is inside one allocation; no alignment is needed.
pub(super) trait Vector: Copy {
    const WIDTH: usize;
    /// Rows of a tile of 1, 2 and 3 vectors, see `kernel_gemm.rs`.
    const HEIGHTS: [usize; 3];
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// The first `count`, the others 0.
    unsafe fn load_part(from: *const f32, count: usize) -> Self;
    unsafe fn store_part(self, to: *mut f32, count: usize);
    /// `self + a * b`, rounded once where the processor can.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
}

/// The portable vector.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 8]);

impl Plain {
    #[inline(always)]
    fn map(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self;
        for (it, other) in out.0.iter_mut().zip(other.0) {
            *it = f(*it, other);
        }
        out
    }
}

impl Vector for Plain {
    const WIDTH: usize = 8;
    const HEIGHTS: [usize; 3] = [4, 4, 2];
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Plain([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Plain(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> Self {
        let mut out = [0.0; 8];
        // SAFETY: the caller's; `count` is at most the width.
        unsafe { from.copy_to_nonoverlapping(out.as_mut_ptr(), count) };
        Plain(out)
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's; `count` is at most the width.
        unsafe { to.copy_from_nonoverlapping(self.0.as_ptr(), count) };
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        self.map(a.map(b, |a, b| a * b), |sum, product| sum + product)
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.map(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.map(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.map(other, |a, b| if a < b { b } else { a })
    }
}

/// Both x86 vectors: the same words with other names of instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_vector {
    ($name:ident($register:ty), $width:literal, $heights:expr,
     $set1:ident $load:ident $store:ident $fma:ident $add:ident $mul:ident $max:ident,
     $mask:ident, $load_part:ident, $store_part:ident) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name($register);

        // SAFETY of all blocks: the caller's, see [`Vector`].
        #[allow(clippy::undocumented_unsafe_blocks, reason = "said once, above")]
        impl Vector for $name {
            const WIDTH: usize = $width;
            const HEIGHTS: [usize; 3] = $heights;
            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                $name(unsafe { $set1(value) })
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                $name(unsafe { $load(from) })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            unsafe fn load_part(from: *const f32, count: usize) -> Self {
                $name(unsafe { $load_part($mask(count), from) })
            }
            #[inline(always)]
            unsafe fn store_part(self, to: *mut f32, count: usize) {
                unsafe { $store_part(to, $mask(count), self.0) }
            }
            #[inline(always)]
            unsafe fn add_product(self, a: Self, b: Self) -> Self {
                $name(unsafe { $fma(a.0, b.0, self.0) })
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                $name(unsafe { $add(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                $name(unsafe { $mul(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                $name(unsafe { $max(self.0, other.0) })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_vector!(V8(__m256), 8, [8, 6, 3],
    _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_fmadd_ps _mm256_add_ps _mm256_mul_ps
    _mm256_max_ps, mask8, load_mask8, _mm256_maskstore_ps);
#[cfg(target_arch = "x86_64")]
x86_vector!(V16(__m512), 16, [12, 12, 8],
    _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_fmadd_ps _mm512_add_ps _mm512_mul_ps
    _mm512_max_ps, mask16, _mm512_maskz_loadu_ps, _mm512_mask_storeu_ps);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn mask8(count: usize) -> __m256i {
    const ONES: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: `count` is at most 8, so 8 values from `8 - count` are inside the array.
    unsafe { _mm256_loadu_si256(ONES.as_ptr().add(8 - count).cast()) }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn load_mask8(mask: __m256i, from: *const f32) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_maskload_ps(from, mask) }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn mask16(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

/// A kernel for all instruction sets: `dispatch!(name(args: Args) = generic)` makes a function
/// `name(isa, args)` that calls `generic::<V>(args)` with the instructions of `isa` enabled.
macro_rules! dispatch {
    ($(#[$doc:meta])* $name:ident($args:ident: $type:ty) = $generic:ident) => {
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// The processor has the instructions, and what the arguments point to is what they say.
        unsafe fn $name(isa: Isa, $args: $type) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($args: $type) {
                // SAFETY: the caller's.
                unsafe { $generic::<V8>($args) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            unsafe fn avx512($args: $type) {
                // SAFETY: the caller's.
                unsafe { $generic::<V16>($args) }
            }
            // SAFETY: the caller's.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2($args),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512($args),
                    _ => $generic::<Plain>($args),
                }
            }
        }
    };
}
pub(super) use dispatch;
