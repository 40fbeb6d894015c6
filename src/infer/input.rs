//! From pictures as bytes to the network's input on its device, in memory that is kept.
//!
//! A CPU gets normalised numbers. A GPU gets the bytes, an eighth to a quarter of that, from memory
//! that it can read by itself, and normalises them there.
#![allow(unsafe_code, reason = "fills tensors in place")]

use std::slice;

use anyhow::Context as _;
use tch::{Device, Kind, TchError, Tensor};

use crate::infer::libtorch::said;

/// The input of one lane, for up to so many pictures of `side` × `side`.
pub(super) struct Input {
    most: usize,
    side: usize,
    kind: Kind,
    normal: Normal,
    place: Place,
}

enum Place {
    /// `[most, side, side, 3]`, f32, normalised.
    Cpu(Tensor),
    Upload(Upload),
}

/// All `[most, side, side, 3]`.
struct Upload {
    device: Device,
    /// u8, on the host, page-locked for a GPU.
    host: Tensor,
    /// u8.
    bytes: Tensor,
    /// f32, normalised.
    exact: Tensor,
    /// The same in the network's precision; `None` iff that is f32.
    lower: Option<Tensor>,
    /// 255, mean, standard deviation.
    constants: [Tensor; 3],
}

impl Input {
    pub(super) fn new(
        device: Device,
        kind: Kind,
        (most, side): (usize, usize),
        normal: Normal,
    ) -> anyhow::Result<Input> {
        let shape = [most as i64, side as i64, side as i64, 3];
        let place = match device {
            Device::Cpu => {
                Tensor::f_zeros(shape, (Kind::Float, Device::Cpu)).map(Place::Cpu).map_err(said)
            }
            _ => Upload::new(device, kind, shape, &normal).map(Place::Upload).map_err(said),
        };
        Ok(Input { most, side, kind, normal, place: place.context("the input buffers")? })
    }

    /// One more, for another lane.
    pub(super) fn another(&self) -> anyhow::Result<Input> {
        let device = match &self.place {
            Place::Cpu(_) => Device::Cpu,
            Place::Upload(it) => it.device,
        };
        Input::new(device, self.kind, (self.most, self.side), self.normal.clone())
    }

    /// Writes the pictures into the first rows, and gives the first `size` as
    /// `[size, 3, side, side]` with the channels last in memory. Rows beyond the pictures keep what
    /// they had: no picture's logits depend on another's pixels.
    pub(super) fn put(&mut self, batch: &[&[u8]], size: usize) -> Result<Tensor, TchError> {
        let size = size as i64;
        let picture = self.side * self.side * 3;
        let count = self.most * picture;
        let pixels = match &mut self.place {
            Place::Cpu(input) => {
                let pointer = input.data_ptr().cast::<f32>();
                // SAFETY: a contiguous CPU tensor of `count` f32, which this input owns; no view of
                // it outlives the batch, and `&mut self` excludes others.
                let all = unsafe { slice::from_raw_parts_mut(pointer, count) };
                for (row, picture) in all.chunks_exact_mut(picture).zip(batch) {
                    self.normal.fill(row, picture);
                }
                input.f_narrow(0, 0, size)?.f_to_kind(self.kind)?
            }
            Place::Upload(upload) => {
                let pointer = upload.host.data_ptr().cast::<u8>();
                // SAFETY: as above, of `count` u8. The copy to the device has ended when it returns.
                let all = unsafe { slice::from_raw_parts_mut(pointer, count) };
                for (row, picture) in all.chunks_exact_mut(picture).zip(batch) {
                    row.copy_from_slice(picture);
                }
                upload.normalise(size)?
            }
        };
        pixels.f_permute([0, 3, 1, 2])
    }
}

impl Upload {
    fn new(
        device: Device,
        kind: Kind,
        shape: [i64; 4],
        normal: &Normal,
    ) -> Result<Upload, TchError> {
        let host = Tensor::f_zeros(shape, (Kind::Uint8, Device::Cpu))?;
        let zeros = |kind| Tensor::f_zeros(shape, (kind, device));
        let constant = |values: &[f32]| Tensor::f_from_slice(values)?.f_to_device(device);
        Ok(Upload {
            device,
            host: if device == Device::Cpu { host } else { host.f_pin_memory(device)? },
            bytes: zeros(Kind::Uint8)?,
            exact: zeros(Kind::Float)?,
            lower: if kind == Kind::Float { None } else { Some(zeros(kind)?) },
            constants: [constant(&[255.0])?, constant(&normal.mean)?, constant(&normal.std)?],
        })
    }

    /// What the host's first rows are, on the device. Each step writes into memory that is there.
    fn normalise(&self, size: i64) -> Result<Tensor, TchError> {
        let rows = |it: &Tensor| it.f_narrow(0, 0, size);
        let (mut bytes, exact) = (rows(&self.bytes)?, rows(&self.exact)?);
        bytes.f_copy_(&rows(&self.host)?)?;
        let [full, mean, std] = &self.constants;
        let unit = bytes.f_div_out(&exact, full)?;
        let exact = unit.f_sub_out(&exact, mean)?.f_div_out(&exact, std)?;
        let Some(lower) = &self.lower else { return Ok(exact) };
        let mut lower = rows(lower)?;
        lower.f_copy_(&exact)?;
        Ok(lower)
    }
}

/// From bytes to what the network was trained on, rounded as torchvision's `ToTensor` and
/// `Normalize` round.
#[derive(Clone)]
pub(super) struct Normal {
    mean: [f32; 3],
    std: [f32; 3],
    table: Box<[[f32; 3]; 256]>,
}

impl Normal {
    pub(super) fn new(mean: [f32; 3], std: [f32; 3]) -> Normal {
        let mut table = Box::new([[0.0; 3]; 256]);
        for (byte, row) in table.iter_mut().enumerate() {
            for (channel, it) in row.iter_mut().enumerate() {
                *it = (byte as f32 / 255.0 - mean[channel]) / std[channel];
            }
        }
        Normal { mean, std, table }
    }

    fn fill(&self, row: &mut [f32], picture: &[u8]) {
        for (out, rgb) in row.as_chunks_mut::<3>().0.iter_mut().zip(picture.as_chunks::<3>().0) {
            for channel in 0..3 {
                out[channel] = self.table[usize::from(rgb[channel])][channel];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_makes_of_bytes_is_what_the_cpu_is_given() {
        let _guard = tch::no_grad_guard();
        let (most, side) = (3, 16);
        let normal = Normal::new([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
        let shape = [most as i64, side as i64, side as i64, 3];
        for (kind, allowed) in [(Kind::Float, 0.0), (Kind::Half, 2e-3), (Kind::BFloat16, 2e-2)] {
            let size = (most, side);
            let mut cpu = Input::new(Device::Cpu, Kind::Float, size, normal.clone()).unwrap();
            let upload = Upload::new(Device::Cpu, kind, shape, &normal).unwrap();
            let place = Place::Upload(upload);
            let mut gpu = Input { most, side, kind, normal: normal.clone(), place };
            for first in [0, 100] {
                let picture = |i: usize| (0..side * side * 3).map(move |it| (it * 7 + i) as u8);
                let pictures = [picture(first).collect::<Vec<_>>(), picture(first + 1).collect()];
                let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
                let want = cpu.put(&batch, 2).unwrap();
                let got = gpu.put(&batch, 2).unwrap();
                assert_eq!((got.size(), got.kind()), (vec![2, 3, 16, 16], kind));
                assert_eq!(got.stride(), want.stride(), "channels last");
                let off = (got.to_kind(Kind::Float) - want).abs().max().double_value(&[]);
                assert!(off <= allowed, "{kind:?}: {off}");
            }
        }
    }
}
