//! Media made for one test, by GStreamer and ffmpeg.

use std::{path::Path, process::Command};

use gstreamer::{self as gst, prelude::*};

/// Runs a pipeline of GStreamer's launch syntax to its end.
pub(crate) fn launch(text: &str) {
    gst::init().unwrap();
    let pipeline = gst::parse::launch(text).unwrap().downcast::<gst::Pipeline>().unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let kinds = [gst::MessageType::Eos, gst::MessageType::Error];
    let limit = gst::ClockTime::from_seconds(60);
    let message = pipeline.bus().unwrap().timed_pop_filtered(limit, &kinds).expect("it ends");
    assert_eq!(message.type_(), gst::MessageType::Eos, "{text}: {message:?}");
    pipeline.set_state(gst::State::Null).unwrap();
}

/// Runs ffmpeg.
pub(crate) fn ffmpeg(arguments: &str, output: &Path) {
    let result = Command::new("ffmpeg")
        .args(["-v", "error", "-nostdin", "-y"])
        .args(arguments.split_whitespace())
        .arg(output)
        .output()
        .expect("ffmpeg is there: run scripts/setup test");
    let said = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "ffmpeg {arguments}: {said}");
}

/// How many pictures ffprobe decodes in a file.
pub(crate) fn frames_by_ffprobe(path: &Path) -> usize {
    let result = Command::new("ffprobe")
        .args(["-v", "error", "-select_streams", "v:0", "-count_frames"])
        .args(["-show_entries", "stream=nb_read_frames", "-of", "csv=p=0"])
        .arg(path)
        .output()
        .expect("ffprobe is there: run scripts/setup test");
    let said = String::from_utf8(result.stdout).unwrap();
    // Of a transport stream it says it once more, for the programme.
    let first = said.lines().next().unwrap_or_default();
    first.trim_end_matches(',').parse().unwrap_or_else(|_| panic!("ffprobe said {said:?}"))
}

/// `frames` JPEG pictures of one colour.
pub(crate) fn jpegs(folder: &Path, (width, height): (u32, u32), frames: u32) -> Vec<Vec<u8>> {
    let name = format!("{width}x{height}");
    launch(&format!(
        "videotestsrc num-buffers={frames} pattern=red \
         ! video/x-raw,format=I420,width={width},height={height} ! jpegenc \
         ! multifilesink location=\"{}/{name}-%d.jpg\"",
        folder.display()
    ));
    let read = |i| std::fs::read(folder.join(format!("{name}-{i}.jpg"))).unwrap();
    (0..frames).map(read).collect()
}
