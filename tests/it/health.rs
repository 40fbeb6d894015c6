//! The health of pictures: real clips and made ones, through the real decoder to events.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ghostwatch::{
    frame::{Frame, StateChange},
    health::{Flag, Settings, measure::measure},
    ledger::Stream,
    preprocess::{Geometry, Preprocessor},
    source::{self, Closed, End, Output, Spec, gst::GstOpener},
    stage::{Reason, StageName},
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    end_to_end::{FRAME, STATE, account, configure, drain, events, get, ghostwatch, said, start},
    source::clip,
    support::{size, wait_until},
    support_media::ffmpeg,
};

const GEOMETRY: Geometry = Geometry { resize: 256, crop: 224 };

/// Looks at every picture as the pipeline does, only without the network.
struct Looker {
    stream: Arc<Stream>,
    preprocessor: Preprocessor,
    pixels: Vec<u8>,
    /// What pictures and the stream were called.
    flags: BTreeSet<&'static str>,
    /// Each change of what the stream is called, with the time of its picture.
    heard: Vec<(Duration, Vec<&'static str>)>,
    /// The longest run of pictures with equal bytes.
    equal: (usize, usize),
}

impl Output for Looker {
    fn frame(&mut self, frame: Frame, _stop: &CancellationToken) -> Result<(), Closed> {
        let Frame { mut meta, picture } = frame;
        let before = self.pixels.clone();
        self.preprocessor.run(&picture, &mut self.pixels).unwrap();
        self.equal.0 = if before == self.pixels { self.equal.0 + 1 } else { 1 };
        self.equal.1 = self.equal.1.max(self.equal.0);
        meta.quality.look = Some(measure(&self.pixels, GEOMETRY.crop));
        if let Some(news) = self.stream.health().seen(&mut meta, &self.stream) {
            self.heard.push((meta.pts, news.flags.iter().map(|it| it.0.name()).collect()));
        }
        self.flags.extend(meta.quality.flags.iter().map(|it| it.name()));
        self.flags.extend(self.stream.health().flags().iter().map(|it| it.0.name()));
        meta.stream.published();
        Ok(())
    }

    fn state(&mut self, mut change: StateChange, _stop: &CancellationToken) -> Result<(), Closed> {
        self.stream.health().changed(&mut change);
        Ok(())
    }
}

/// Looks at a whole file.
fn look(path: &Path, settings: Settings) -> Looker {
    let spec = Spec::parse(path.to_str().unwrap()).unwrap();
    let stream = Arc::new(Stream::watched("a", Settings { by_pts: true, ..settings }));
    let mut opener = GstOpener::new(spec.clone(), stream.clone()).unwrap();
    let mut looker = Looker {
        stream: stream.clone(),
        preprocessor: Preprocessor::new(GEOMETRY),
        pixels: vec![0; GEOMETRY.bytes()],
        flags: BTreeSet::new(),
        heard: Vec::new(),
        equal: (0, 0),
    };
    let settings = source::Settings::new(&spec, 0);
    let stop = CancellationToken::new();
    assert_eq!(source::run(&mut opener, stream, settings, &mut looker, &stop), End::Ended);
    looker
}

#[test]
fn nothing_is_wrong_with_real_clips() {
    // As impatient as can be configured, so that a clip of some seconds is long enough.
    let settings = Settings { frozen_after: Some(Duration::from_secs(1)), ..Settings::default() };
    for name in ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"] {
        let looker = look(&clip(name), settings);
        assert!(looker.flags.is_empty(), "{name}: {:?}", looker.flags);
    }
}

#[test]
fn a_stream_is_corrupt_once_a_picture_was_broken_and_5_s_after_the_last_one_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.h264");
    let from = clip("bikes.mp4");
    ffmpeg(&format!("-i {} -an -c:v libx264 -g 25 -bf 0 -b:v 400k", from.display()), &path);
    let mut bytes = std::fs::read(&path).unwrap();
    // In the second of ten seconds.
    let at = bytes.len() / 8;
    bytes[at..at + 40].iter_mut().for_each(|it| *it = !*it);
    std::fs::write(&path, bytes).unwrap();
    let looker = look(&path, Settings::default());
    let heard: Vec<_> = looker.heard.iter().map(|it| it.1.clone()).collect();
    assert_eq!(heard, [vec!["corrupt"], vec![]], "{:?}", looker.heard);
    let lasted = looker.heard[1].0 - looker.heard[0].0;
    assert_eq!(lasted.as_secs(), 5, "{:?}", looker.heard);
    assert!(looker.stream.dropped(StageName::Source, Reason::Corrupt) < 26);
}

/// A picture of a real scene that stands still, as x264 writes it with few bits and a keyframe
/// every 10 s, with this filter before it.
fn still(folder: &Path, name: &str, filter: &str, seconds: u32) -> PathBuf {
    let picture = folder.join("still.png");
    let from = clip("bikes.mp4");
    ffmpeg(&format!("-ss 1 -i {} -frames:v 1 -vf scale=480:-2", from.display()), &picture);
    let path = folder.join(name);
    let rate = "-pix_fmt yuv420p -c:v libx264 -preset veryfast -crf 38 -g 50 -keyint_min 50";
    let arguments = format!(
        "-loop 1 -framerate 5 -i {} -t {seconds} -vf {filter} {rate} -sc_threshold 0",
        picture.display()
    );
    ffmpeg(&arguments, &path);
    path
}

#[test]
fn a_still_noisy_scene_with_few_bits_is_not_frozen_and_a_frozen_one_is() {
    let folder = tempfile::tempdir().unwrap();
    let seconds = size(70, 600);
    for noise in [1, 4, 12] {
        let filter = format!("noise=alls={noise}:allf=t");
        let path = still(folder.path(), "noisy.mp4", &filter, seconds);
        // Less than the keyframe interval, three of which must pass: what is not frozen after 5 s
        // is not after 30 s either.
        let after = Some(Duration::from_secs(5));
        let looker = look(&path, Settings { frozen_after: after, ..Settings::default() });
        assert!(looker.flags.is_empty(), "{noise}: {:?}", looker.flags);
        assert_eq!(looker.stream.keyframes(), u64::from(seconds) / 10);
        // Why it is not easy: the pictures of 10 s are the same to the last bit.
        assert!(noise != 1 || 45 <= looker.equal.1, "{:?}", looker.equal);
    }
    let path = still(folder.path(), "frozen.mp4", "null", seconds);
    let looker = look(&path, Settings::default());
    assert_eq!(looker.flags.into_iter().collect::<Vec<_>>(), [Flag::Frozen.name()]);
}

/// The flags in a state event, by name.
fn flags(event: &Value) -> Vec<&str> {
    let flags = event["data"]["flags"].as_array().unwrap();
    flags.iter().map(|it| it["name"].as_str().unwrap()).collect()
}

#[test]
fn a_test_pattern_without_motion_is_told_to_be_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let streams = "  still: {url: \"test:?size=64x48&fps=20&pattern=checkers-8\", realtime: true, \
                   health: {frozen_after: 1s}}\n  \
                   snow: {url: \"test:?size=64x48&fps=20&pattern=snow\", realtime: true, \
                   health: {frozen_after: 1s}}\n";
    let listen = configure(folder.path(), streams);
    let child = start(folder.path());
    let has = |text: &str| get(&listen, "/metrics").is_some_and(|it| it.contains(text));
    wait_until("it is frozen", || has("ghostwatch_stream_frozen{stream=\"still\"} 1\n"));
    assert!(has("ghostwatch_stream_flag{flag=\"frozen\",stream=\"still\"} 1\n"));
    assert!(has("ghostwatch_stream_flag{flag=\"dark\",stream=\"still\"} 0\n"));
    assert!(has("ghostwatch_stream_frozen{stream=\"snow\"} 0\n"));
    wait_until("the table shows it", || {
        let output = ghostwatch(folder.path()).arg("streams").output().unwrap();
        let table = String::from_utf8(output.stdout).unwrap();
        table.lines().any(|it| it.starts_with("still") && it.contains("up (frozen)"))
    });
    drain(child, folder.path());
    let events = events(folder.path());
    let mine = |kind: &str| -> Vec<&Value> {
        events.iter().filter(|it| it["type"] == kind && it["subject"] == "still").collect()
    };
    let told: Vec<_> =
        mine(STATE).iter().map(|it| (it["data"]["state"].as_str().unwrap(), flags(it))).collect();
    let expected =
        [("connecting", vec![]), ("up", vec![]), ("up", vec!["frozen"]), ("removed", vec![])];
    assert_eq!(told, expected);
    let news = mine(STATE)[2];
    let place = events.iter().position(|it| it == news).unwrap();
    let since = |it: &Value| it["since"].as_str().unwrap().to_owned();
    assert_eq!(since(&news["data"]), since(&mine(STATE)[1]["data"]), "it is up as long as before");
    assert!(since(&news["data"]["flags"][0]).as_str() < news["time"].as_str().unwrap());
    for (i, event) in events.iter().enumerate().filter(|it| it.1["type"] == FRAME) {
        let frozen = event["data"]["quality"]["flags"] == serde_json::json!(["frozen"]);
        assert_eq!(frozen, event["subject"] == "still" && place < i, "{event}");
    }
    account(&events);
}

#[test]
fn bad_pictures_get_a_label_unless_configured_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let black = "url: \"test:?size=64x48&fps=10&frames=40&pattern=black\"";
    configure(
        folder.path(),
        &format!(
            "  labelled: {{{black}}}\n  dropped: {{{black}, health: {{label_bad_pictures: false}}}}\n"
        ),
    );
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let events = events(folder.path());
    let account = account(&events);
    assert_eq!((account["labelled"], account["dropped"]), ((40, 40), (40, 0)));
    let ended = |id: &str| {
        let is = |it: &&Value| it["subject"] == id && it["data"]["state"] == "ended";
        events.iter().find(is).unwrap()["data"]["skipped"].clone()
    };
    assert_eq!(ended("dropped"), serde_json::json!({"corrupt": 40}));
    assert_eq!(ended("labelled"), serde_json::json!({}));
    for id in ["labelled", "dropped"] {
        let told = events.iter().filter(|it| it["type"] == STATE && it["subject"] == id);
        let raised: Vec<_> = told.map(flags).filter(|it| !it.is_empty()).collect();
        assert_eq!(raised, [["dark", "uniform"]], "{id}: once");
    }
    let frames = events.iter().filter(|it| it["type"] == FRAME);
    for frame in frames {
        let quality = serde_json::json!({"mean_luma": 0.0, "flags": ["dark", "uniform"]});
        assert_eq!(frame["data"]["quality"], quality);
    }
}
