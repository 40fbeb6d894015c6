//! What each fuzz target does with its bytes, and the replay of the corpora.
//!
//! Compiled twice: into the fuzz crate, and into the daemon's unit tests.

use std::path::Path;

use crate::{
    cli::text,
    config::{self, Options},
    event::{DaemonState, Event, Kind},
    frame::{Colour, Layout, Matrix, Picture, Planes, Siting},
    http::{Access, Token, query},
    infer::weights,
    journal::filter::Filter,
    preprocess::{Geometry, Preprocessor},
    source::url::SourceUrl,
};

/// What a target does.
pub type Target = fn(&[u8]);

/// Every target, under the name of its corpus.
pub const TARGETS: [(&str, Target); 7] = [
    ("pth", pth),
    ("safetensors", safetensors),
    ("config", config),
    ("event", event),
    ("url", url),
    ("http", http),
    ("preprocess", preprocess),
];

/// A `.pth` file in the zip or the old stream format: both readers see every input, whatever its
/// first bytes say.
pub fn pth(data: &[u8]) {
    drop(weights::zip::parse(data));
    drop(weights::legacy::parse(data));
}

/// A safetensors file with its metadata: what is read survives being written.
pub fn safetensors(data: &[u8]) {
    let Ok(first) = weights::parse(data, true) else {
        return;
    };
    let mut file = Vec::new();
    weights::safetensors::write(&mut file, &first.tensors, &first.metadata.strings())
        .expect("a vector takes everything");
    let second = weights::parse(&file, true).expect("what was written is read");
    assert_eq!(first.metadata, second.metadata);
    // Not the tensors themselves: a NaN is not equal to itself.
    let bits = |it: &weights::Checkpoint| -> Vec<_> {
        let bits = |it: &weights::Tensor| it.data.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
        it.tensors.iter().map(|it| (it.0.clone(), it.1.shape.clone(), bits(it.1))).collect()
    };
    assert_eq!(bits(&first), bits(&second));
}

/// A configuration: it gives a plan, or problems that are one printable line each.
pub fn config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let env = |name: &str| (name == "SET").then(|| "value".to_owned());
    let options = Options { env, secrets: false, files: false };
    match config::load_text(text, Path::new("fuzz.yaml"), Path::new("/nowhere"), &options) {
        Ok(loaded) => {
            assert!(config::diff::diff(&loaded.plan, &loaded.plan).is_empty());
            for stream in loaded.plan.streams.values() {
                assert_printable(&stream.shown());
            }
        }
        Err(problems) => {
            let text = problems.to_string();
            assert!(!text.is_empty(), "a refusal has a reason");
            text.lines().for_each(assert_printable);
        }
    }
}

/// Text from a journal, as an event: filters and the lines for people take anything, and what we
/// write ourselves around any text is JSON that holds that text.
pub fn event(data: &[u8]) {
    let Ok(json) = str::from_utf8(data) else {
        return;
    };
    let filter = Filter {
        label: Some("minivan".to_owned()),
        min_confidence: Some(0.5),
        ..Filter::default()
    };
    filter.matches(Some(Kind::FrameClassified), Some("front"), json);
    assert_printable(&text::event(json, text::Clock::Utc));
    let event = Event::daemon(json, DaemonState::Started, Some(json));
    let envelope = event.envelope("01JH8Z6Q3K5V9W2X4Y6Z8A0B2C", 1);
    assert!(!envelope.contains('\n'), "one event is one line");
    let read: serde_json::Value = serde_json::from_str(&envelope).expect("an event is JSON");
    assert_eq!(read["data"]["detail"], json);
    assert_printable(&text::event(&envelope, text::Clock::Utc));
}

/// What is secret in the URLs of [`url`].
const CANARY: &str = "S3cr3tC4n4ry";

/// A source URL, alone and around a secret: no secret is ever printed.
pub fn url(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    if let Ok(parsed) = SourceUrl::parse(text) {
        assert_printable(&parsed.url.to_string());
    }
    let (before, after) = text.split_once('\n').unwrap_or((text, ""));
    for url in [
        format!("rtsp://{before}:{CANARY}{after}@camera.example/{after}"),
        format!("rtsp://{CANARY}:{before}@camera.example/{after}"),
        format!("https://{before}{CANARY}:x@camera.example/{after}"),
        format!("http://camera.example/stream?{before}{CANARY}{after}"),
        format!("rtsps://camera.example:322/a?{before}&password={CANARY}&{after}"),
        format!("rtsp://camera.example/user=admin_password={CANARY}{after}"),
    ] {
        let printed = match SourceUrl::parse(&url) {
            Ok(parsed) => format!("{} {parsed:?}", parsed.url),
            Err(error) => format!("{error} {error:?}"),
        };
        assert!(!printed.contains(CANARY), "{url:?} prints {printed:?}");
    }
}

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// A request's query, host and authorization, a line each: nobody gets in without the token.
pub fn http(data: &[u8]) {
    let mut lines = data.split(|it| *it == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    if let Ok(text) = str::from_utf8(line()) {
        let asked = query::verbose(Some(text));
        assert!(!asked || text.contains("verbose"));
    }
    let (host, authorization) = (line(), line());
    let request = hyper::Request::builder().header("host", host);
    let request = request.header("authorization", authorization).body(());
    let Ok(request) = request else {
        return;
    };
    let token = Token::new(TOKEN).expect("the token is long enough");
    if Access::new(Some(token), &[]).check(&request).is_ok() {
        let authorization = String::from_utf8_lossy(authorization);
        // Bearer carries the token itself, Basic the base64 of it: 3 bytes are 4 letters, at one of
        // three offsets.
        let basic =
            ["Njc4OWFiY2RlZjAxMjM0NTY3", "NTY3ODlhYmNkZWYwMTIzNDU2", "NDU2Nzg5YWJjZGVmMDEyMzQ1"];
        let has =
            authorization.contains(TOKEN) || basic.iter().any(|it| authorization.contains(it));
        assert!(has, "let in with {authorization:?}");
    }
    let open = Access::new(None, &[]).check(&request);
    assert!(open.is_err() || !host.is_empty());
}

struct Bytes([Vec<u8>; 3]);

impl Planes for Bytes {
    fn plane(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

/// A picture of any layout, size and strides, resized to any size: the vector code gives the bytes
/// of the scalar code, the gaps between rows change nothing, and nothing is read outside a plane.
pub fn preprocess(data: &[u8]) {
    let mut header = [0; 12];
    let head = data.len().min(header.len());
    header[..head].copy_from_slice(&data[..head]);
    let content = &data[head..];
    let [layout, width, height, more, resize, crop, colour, first, second, third, short, seed] =
        header.map(usize::from);
    let layout = [Layout::I420, Layout::Nv12, Layout::Rgb, Layout::Gray8][layout % 4];
    // The sides go to 1,020 pixels, but not both.
    let (width, height) = match more % 3 {
        0 => (width, height),
        1 => (width * 4, height % 32),
        _ => (width % 32, height * 4),
    };
    let resize = 1 + resize % 96;
    let geometry = Geometry { resize, crop: 1 + crop % resize };
    let colour = Colour {
        matrix: [Matrix::Bt601, Matrix::Bt709, Matrix::Bt2020][colour % 3],
        full_range: colour & 4 != 0,
        siting_x: if colour & 8 == 0 { Siting::Centre } else { Siting::Cosited },
        siting_y: if colour & 16 == 0 { Siting::Centre } else { Siting::Cosited },
    };
    let half = (width.div_ceil(2), height.div_ceil(2));
    let shapes = match layout {
        Layout::I420 => [(width, height), half, half],
        Layout::Nv12 => [(width, height), (half.0 * 2, half.1), (0, 0)],
        Layout::Rgb => [(width * 3, height), (0, 0), (0, 0)],
        Layout::Gray8 => [(width, height), (0, 0), (0, 0)],
    };
    let picture = |gaps: [usize; 3], short: usize| {
        let strides = [0, 1, 2].map(|it| shapes[it].0 + gaps[it]);
        let planes = [0, 1, 2].map(|it| {
            let (row, rows) = shapes[it];
            let mut plane = Vec::new();
            for y in 0..rows {
                plane.extend((0..row).map(|x| byte(content, seed, (it, y * row + x))));
                // The last row ends where its pixels end, as a decoder may leave it.
                plane.resize(plane.len() + if y + 1 < rows { gaps[it] } else { 0 }, 0xA5);
            }
            plane.truncate(plane.len().saturating_sub(short));
            plane.shrink_to_fit();
            plane
        });
        Picture { layout, colour, width, height, strides, planes: Box::new(Bytes(planes)) }
    };
    let run = |mut by: Preprocessor, picture: &Picture| {
        let mut out = vec![0; geometry.bytes()];
        by.run(picture, &mut out).map(|()| out)
    };
    // One picture in eight misses bytes at the end.
    let short = if short % 8 == 7 { 1 + short / 8 } else { 0 };
    let loose = picture([first, second, third], short);
    let scalar = run(Preprocessor::scalar(geometry), &loose);
    let fast = run(Preprocessor::new(geometry), &loose);
    assert_eq!(fast.is_ok(), scalar.is_ok());
    assert_eq!(fast.is_ok(), short == 0 && 0 < width && 0 < height);
    if let (Ok(fast), Ok(scalar)) = (fast, scalar) {
        assert!(fast == scalar, "{layout:?} {width}x{height} to {geometry:?}");
        let tight = run(Preprocessor::new(geometry), &picture([0; 3], 0));
        assert!(Ok(fast) == tight, "the gaps of {layout:?} {width}x{height} count");
    }
}

/// A byte of the input, or noise after its end.
fn byte(content: &[u8], seed: usize, (plane, at): (usize, usize)) -> u8 {
    let noise = || (((at * 3 + plane + seed) as u32).wrapping_mul(2_654_435_761) >> 24) as u8;
    content.get(at).copied().unwrap_or_else(noise)
}

fn assert_printable(text: &str) {
    assert!(!text.contains(|it: char| it.is_control()), "{text:?} steers a terminal");
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::TARGETS;

    #[test]
    fn every_fuzzed_input_that_was_kept_is_taken() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
        let mut bytes = 0;
        for (name, target) in TARGETS {
            let mut files = 0;
            for file in fs::read_dir(corpora.join(name)).expect("each target has a corpus") {
                let path = file.expect("readable").path();
                let data = fs::read(&path).expect("readable");
                println!("{}", path.display());
                target(&data);
                bytes += data.len();
                files += 1;
            }
            assert!(0 < files, "the corpus of {name} is empty");
        }
        assert!(bytes < 300_000, "the corpora have {bytes} bytes: keep them small");
    }
}
