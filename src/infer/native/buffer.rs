//! Memory for maps and weights that begins at a cache line.

use std::ops::{Deref, DerefMut};

/// f32 per cache line. A vector that lies in two lines is loaded twice, in effect.
const LINE: usize = 16;

/// Numbers, the first at a multiple of 64 bytes.
#[derive(Debug)]
pub(super) struct Buffer {
    values: Vec<f32>,
    first: usize,
    count: usize,
}

impl Buffer {
    /// Zeros.
    pub(super) fn new(count: usize) -> Buffer {
        let values = vec![0.0f32; count + LINE];
        // Where the allocator gives no address that can be aligned, slower is still right.
        let first = values.as_ptr().align_offset(LINE * 4).min(LINE);
        Buffer { values, first, count }
    }

    /// A copy.
    pub(super) fn of(values: &[f32]) -> Buffer {
        let mut buffer = Buffer::new(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[self.first..][..self.count]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.first..][..self.count]
    }
}
