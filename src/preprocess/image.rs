//! PNG and JPEG files to RGB, with the pixels that Pillow's `Image.open(…).convert("RGB")` gives.
//!
//! For `classify`; streams never come here. JPEG is decoded by libjpeg-turbo's code (in mozjpeg),
//! as in Pillow: the standard leaves the last bit open, and the golden files hold us to Pillow's.

use std::{
    io::{self, BufRead, Cursor, Read},
    panic::{AssertUnwindSafe, catch_unwind},
};

use mozjpeg::{ColorSpace, Decompress};
use png::{BitDepth, ColorType, Transformations};

use crate::{
    frame::{Colour, Layout, Matrix, Picture, Planes, Siting},
    preprocess::SIDE_MAX,
};

/// The most pixels a file may have: twice Pillow's `MAX_IMAGE_PIXELS`, where it refuses, too.
const PIXELS_MAX: usize = 2 * 89_478_485;

/// Why a file gave no picture.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Neither PNG nor JPEG.
    #[error("the file is neither PNG nor JPEG; convert it to one of them")]
    Unknown,
    /// The PNG is broken.
    #[error("the PNG file cannot be read: {0}")]
    Png(#[from] png::DecodingError),
    /// The JPEG is broken.
    #[error("the JPEG file cannot be read: {0}")]
    Jpeg(String),
    /// More pixels than a picture may have.
    #[error(
        "the picture has {width}x{height} pixels, more than {PIXELS_MAX} or {SIDE_MAX} on a side; \
         scale it down"
    )]
    TooLarge {
        /// Pixels in a row.
        width: usize,
        /// Rows.
        height: usize,
    },
}

/// A decoded file: RGB, rows top to bottom without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels, from 1.
    pub width: usize,
    /// Height in pixels, from 1.
    pub height: usize,
    /// `[height, width, 3]`.
    pub pixels: Vec<u8>,
}

impl Planes for Image {
    fn plane(&self, _: usize) -> &[u8] {
        &self.pixels
    }
}

impl From<Image> for Picture {
    fn from(image: Image) -> Picture {
        let siting = Siting::Centre;
        Picture {
            layout: Layout::Rgb,
            colour: Colour {
                matrix: Matrix::Bt601,
                full_range: true,
                siting_x: siting,
                siting_y: siting,
            },
            width: image.width,
            height: image.height,
            strides: [image.width * 3, 0, 0],
            planes: Box::new(image),
        }
    }
}

/// Decodes a PNG or JPEG file from memory. The first bytes tell which it is. Orientation marks,
/// colour profiles and gamma are not applied, and transparency is left out, as in Pillow.
///
/// # Errors
///
/// [`ImageError`] if the bytes are no such file, are damaged or end early, or the picture is too
/// large.
pub fn decode(bytes: &[u8]) -> Result<Image, ImageError> {
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        decode_png(bytes)
    } else if bytes.starts_with(b"\xff\xd8\xff") {
        // libjpeg's fatal errors arrive as unwinding from its error handler. What it worked on is
        // dropped on the way, so nothing half-done is seen afterwards.
        catch_unwind(AssertUnwindSafe(|| decode_jpeg(bytes))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map_or("it is damaged", |it| it.as_str());
            Err(ImageError::Jpeg(text.trim_start_matches("libjpeg fatal error: ").to_owned()))
        })
    } else {
        Err(ImageError::Unknown)
    }
}

/// Checks the size before anything is allocated for it.
fn check_size(width: usize, height: usize) -> Result<(), ImageError> {
    let pixels = width.checked_mul(height);
    let fits = pixels.is_some_and(|it| it <= PIXELS_MAX) && width.max(height) <= SIDE_MAX;
    if fits { Ok(()) } else { Err(ImageError::TooLarge { width, height }) }
}

fn decode_png(bytes: &[u8]) -> Result<Image, ImageError> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    // The samples as they are stored: their conversions here are Pillow's, not the crate's.
    decoder.set_transformations(Transformations::IDENTITY);
    let mut reader = decoder.read_info()?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    check_size(width, height)?;
    let line_bytes = reader.info().raw_row_length() - 1;
    let mut samples = vec![0; line_bytes * height];
    reader.next_frame(&mut samples)?;
    let info = reader.info();
    let palette = info.palette.as_deref().unwrap_or(&[]);
    let mut pixels = Vec::with_capacity(width * height * 3);
    for line in samples.chunks_exact(line_bytes) {
        for x in 0..width {
            pixels.extend(png_pixel(line, x, (info.color_type, info.bit_depth), palette));
        }
    }
    Ok(Image { width, height, pixels })
}

/// One pixel of a line as it is stored.
fn png_pixel(line: &[u8], x: usize, kind: (ColorType, BitDepth), palette: &[u8]) -> [u8; 3] {
    let (colour, depth) = kind;
    let bits = depth as usize;
    let wide = bits / 8;
    // A packed sample: the first one lies in the highest bits.
    let packed = || (line[x * bits / 8] >> (8 - bits - x * bits % 8)) & (0xff >> (8 - bits));
    // The high byte of a sample of whole bytes.
    let byte = |channels: usize, channel: usize| line[(x * channels + channel) * wide];
    match colour {
        // Pillow keeps 16-bit grey as numbers, and cuts them off at 255 when it makes RGB.
        ColorType::Grayscale if depth == BitDepth::Sixteen => {
            let low = line[x * 2 + 1];
            [if byte(1, 0) == 0 { low } else { 255 }; 3]
        }
        ColorType::Grayscale => [packed() * (255 / (0xff >> (8 - bits)) as u8); 3],
        ColorType::GrayscaleAlpha => [byte(2, 0); 3],
        ColorType::Rgb => [0, 1, 2].map(|it| byte(3, it)),
        ColorType::Rgba => [0, 1, 2].map(|it| byte(4, it)),
        ColorType::Indexed => {
            let at = usize::from(packed()) * 3;
            // An index beyond the palette is black.
            palette.get(at..at + 3).map_or([0; 3], |it| [it[0], it[1], it[2]])
        }
    }
}

/// Bytes whose end is an error. libjpeg would pass a file that ends early off as a grey picture.
struct Whole<'a>(&'a [u8]);

impl Read for Whole<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(target)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Whole<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.0.is_empty() { Err(io::Error::other("the file ends early")) } else { Ok(self.0) }
    }

    fn consume(&mut self, count: usize) {
        self.0 = &self.0[count..];
    }
}

fn decode_jpeg(bytes: &[u8]) -> Result<Image, ImageError> {
    let refused = |error: io::Error| ImageError::Jpeg(error.to_string());
    let jpeg = Decompress::new_reader(Whole(bytes)).map_err(refused)?;
    let (width, height) = jpeg.size();
    check_size(width, height)?;
    let pixels = match jpeg.color_space() {
        ColorSpace::JCS_GRAYSCALE => {
            let grey: Vec<u8> = jpeg.grayscale().and_then(read_all).map_err(refused)?;
            grey.into_iter().flat_map(|it| [it; 3]).collect()
        }
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => {
            let inks = jpeg.to_colorspace(ColorSpace::JCS_CMYK).and_then(read_all);
            inks.map_err(refused)?.chunks_exact(4).flat_map(from_cmyk).collect()
        }
        _ => jpeg.rgb().and_then(read_all).map_err(refused)?,
    };
    Ok(Image { width, height, pixels })
}

fn read_all<R: BufRead>(
    mut jpeg: mozjpeg::decompress::DecompressStarted<R>,
) -> io::Result<Vec<u8>> {
    jpeg.read_scanlines()
}

/// Pillow's `cmyk2rgb`. The inks are stored inverted, as Adobe does; Pillow takes all files so.
fn from_cmyk(inks: &[u8]) -> [u8; 3] {
    let light = u32::from(inks[3]);
    [0, 1, 2].map(|it| {
        let product = u32::from(255 - inks[it]) * light + 128;
        (light - (((product >> 8) + product) >> 8).min(light)) as u8
    })
}
