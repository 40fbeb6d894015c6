//! From a decoded picture to the model input: resize the short side, crop the centre.
//!
//! RGB and full-range grey pictures give the same bytes as torchvision's `Resize` (bilinear,
//! antialiased) and `CenterCrop` on a Pillow image. YUV pictures are resized plane by plane and
//! converted to RGB afterwards: equal to convert-then-resize in exact arithmetic up to rounding,
//! as long as no source pixel lies outside the RGB cube (there, the exact order would clip each
//! source pixel and this one clips the result). Scaling to numbers around zero is not done here.

pub mod image;
mod resize;
mod simd;
#[cfg(test)]
mod tests;
pub mod worker;
mod yuv;

use crate::{
    frame::{Colour, Layout, Picture, Siting},
    preprocess::{resize::Axis, simd::Avx2},
    stage::Reject,
};

/// The longest side that is resized: the limit of JPEG, and far beyond any video.
const SIDE_MAX: usize = 65_535;

/// How many picture kinds a [`Preprocessor`] remembers; more than a worker's streams differ in.
const PLANS_MAX: usize = 32;

/// How a picture becomes a model input (comes with the checkpoint).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// The short side after the resize, in pixels.
    pub resize: usize,
    /// The side of the square cut out of the centre, in pixels.
    pub crop: usize,
}

impl Geometry {
    /// Whether the crop lies inside every resized picture, and the sizes are sane: neither is 0,
    /// the crop is not larger than the resize, and that is at most 4096.
    pub fn is_valid(self) -> bool {
        1 <= self.crop && self.crop <= self.resize && self.resize <= 4096
    }

    /// The number of bytes of one model input.
    pub fn bytes(self) -> usize {
        self.crop * self.crop * 3
    }

    /// Width and height after the resize, as torchvision computes them.
    fn resized(self, width: usize, height: usize) -> (usize, usize) {
        let long = |long: usize, short: usize| self.resize * long / short;
        if width <= height {
            (self.resize, long(height, width))
        } else {
            (long(width, height), self.resize)
        }
    }

    /// Both axes, columns first.
    fn axes(self, width: usize, height: usize) -> (Axis, Axis) {
        let (wide, high) = self.resized(width, height);
        let axis = |input, output| Axis {
            input,
            output,
            first: centre(output, self.crop),
            count: self.crop,
        };
        (axis(width, wide), axis(height, high))
    }
}

/// Where a centre crop begins: half of what is left over, halves to the even neighbour, as
/// Python's `round` has it.
pub(crate) fn centre(size: usize, crop: usize) -> usize {
    let rest = size - crop;
    let half = rest / 2;
    if rest % 2 == 1 && half % 2 == 1 { half + 1 } else { half }
}

/// The rows of one plane.
#[derive(Clone, Copy)]
struct Plane<'a> {
    bytes: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
}

/// All that the weight tables depend on, next to the geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    width: usize,
    height: usize,
    layout: Layout,
    full_range: bool,
    siting: (Siting, Siting),
}

impl Kind {
    fn of(picture: &Picture) -> Kind {
        let Colour { full_range, siting_x, siting_y, .. } = picture.colour;
        Kind {
            width: picture.width,
            height: picture.height,
            layout: picture.layout,
            full_range,
            siting: (siting_x, siting_y),
        }
    }
}

/// The weight tables of one [`Kind`].
#[derive(Debug)]
enum Plan {
    /// Pillow's arithmetic.
    Exact(resize::Plan),
    /// Planes first, colours after.
    Planes(yuv::Plan),
}

impl Plan {
    fn new(kind: Kind, geometry: Geometry) -> Plan {
        let (columns, rows) = geometry.axes(kind.width, kind.height);
        match kind.layout {
            Layout::Rgb => Plan::Exact(resize::Plan::new(columns, rows, 3)),
            Layout::Gray8 if kind.full_range => Plan::Exact(resize::Plan::new(columns, rows, 1)),
            Layout::Gray8 | Layout::I420 | Layout::Nv12 => {
                Plan::Planes(yuv::Plan::new((columns, rows), kind.layout, kind.siting))
            }
        }
    }
}

/// Makes model inputs. Reusable, one per worker; a picture kind's first frame builds its weight
/// tables, later frames allocate nothing.
#[derive(Debug)]
pub struct Preprocessor {
    geometry: Geometry,
    simd: Option<Avx2>,
    /// The most recently used first.
    plans: Vec<(Kind, Plan)>,
    middle: Vec<u8>,
    scratch: yuv::Scratch,
}

impl Preprocessor {
    /// Makes one for a checkpoint's geometry.
    ///
    /// # Panics
    ///
    /// If [`Geometry::is_valid`] says no; whoever reads a geometry from a file checks it there.
    pub fn new(geometry: Geometry) -> Self {
        assert!(geometry.is_valid(), "the crop lies inside the resized picture, got {geometry:?}");
        Preprocessor {
            geometry,
            simd: Avx2::detect(),
            plans: Vec::with_capacity(PLANS_MAX),
            middle: Vec::new(),
            scratch: yuv::Scratch::default(),
        }
    }

    /// One without vector instructions: the reference that the others are held to.
    ///
    /// # Panics
    ///
    /// As [`Preprocessor::new`].
    pub fn scalar(geometry: Geometry) -> Self {
        Preprocessor { simd: None, ..Preprocessor::new(geometry) }
    }

    /// The geometry it was made for.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Writes the picture's model input to `out`: `[crop, crop, 3]`, rows top to bottom, RGB.
    ///
    /// # Errors
    ///
    /// [`Reject::BadSize`] if a side is 0 or over 65,535 pixels; [`Reject::BadShape`] if a plane
    /// is shorter than its rows or a stride shorter than a row.
    ///
    /// # Panics
    ///
    /// If `out` is not [`Geometry::bytes`] long.
    pub fn run(&mut self, picture: &Picture, out: &mut [u8]) -> Result<(), Reject> {
        assert_eq!(out.len(), self.geometry.bytes(), "the slot has the size of a model input");
        let sides = 1..=SIDE_MAX;
        if !sides.contains(&picture.width) || !sides.contains(&picture.height) {
            return Err(Reject::BadSize);
        }
        let planes = planes(picture)?;
        self.warm(Kind::of(picture));
        match &self.plans[0].1 {
            Plan::Exact(plan) => plan.run(planes[0], &mut self.middle, self.simd, out),
            Plan::Planes(plan) => {
                let matrix = yuv::Matrix::new(picture.colour);
                plan.run(&planes, (&matrix, self.simd), &mut self.scratch, out);
            }
        }
        Ok(())
    }

    /// Puts the plan of a kind first, building it if it is new.
    fn warm(&mut self, kind: Kind) {
        if let Some(at) = self.plans.iter().position(|it| it.0 == kind) {
            self.plans[..=at].rotate_right(1);
            return;
        }
        self.plans.truncate(PLANS_MAX - 1);
        self.plans.insert(0, (kind, Plan::new(kind, self.geometry)));
    }
}

/// The picture's planes, each proven to hold its rows. Planes that the layout lacks are empty.
fn planes(picture: &Picture) -> Result<[Plane<'_>; 3], Reject> {
    let (width, height) = (picture.width, picture.height);
    let (half_width, half_height) = (width.div_ceil(2), height.div_ceil(2));
    let none = (0, 0);
    let shapes = match picture.layout {
        Layout::I420 => [(width, height), (half_width, half_height), (half_width, half_height)],
        Layout::Nv12 => [(width, height), (half_width * 2, half_height), none],
        Layout::Rgb => [(width * 3, height), none, none],
        Layout::Gray8 => [(width, height), none, none],
    };
    let mut planes = [Plane { bytes: &[], stride: 0 }; 3];
    for (index, (row_bytes, rows)) in shapes.into_iter().enumerate().filter(|it| 0 < it.1.1) {
        let (bytes, stride) = (picture.planes.plane(index), picture.strides[index]);
        let needed = stride.checked_mul(rows - 1).and_then(|it| it.checked_add(row_bytes));
        if stride < row_bytes || needed.is_none_or(|it| bytes.len() < it) {
            return Err(Reject::BadShape);
        }
        planes[index] = Plane { bytes, stride };
    }
    Ok(planes)
}
