//! The tour: one frame by hand through every stage, each value checked.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    event::{Context, Event},
    frame::{Dated, Meta, Skipped, TimeSource, Timing},
    health::{Flag, Quality, measure::measure},
    infer::Model,
    ledger::{InFlight, Stream},
    postprocess::top,
    preprocess::{Geometry, Preprocessor},
};

use crate::support::{Mean, SIDE, grey_picture};

#[test]
fn one_frame_from_picture_to_event() {
    let stream = Arc::new(Stream::new("front"));
    let now = Instant::now();
    let mut meta = Meta {
        stream: InFlight::decoded(stream.clone()),
        epoch: 3,
        frame: 7,
        pts: Duration::from_millis(280),
        time: SystemTime::UNIX_EPOCH,
        dated: Dated { source: TimeSource::Arrival, error: None, clock_offset_ns: None },
        ingest_time: SystemTime::UNIX_EPOCH,
        size: (SIDE as u32, SIDE as u32),
        timing: Timing::at(now, now),
        skipped: Skipped::default(),
        quality: Quality::default(),
    };

    let picture = grey_picture(51);
    let mut pixels = vec![0; SIDE * SIDE * 3];
    Preprocessor::new(Geometry { resize: SIDE, crop: SIDE }).run(&picture, &mut pixels).unwrap();
    assert_eq!(pixels, vec![51; SIDE * SIDE * 3]);

    meta.quality.look = Some(measure(&pixels, SIDE));
    assert!(meta.stream.stream().clone().health().seen(&mut meta, &stream).is_none());
    assert_eq!(meta.quality.flags, [Flag::Uniform]);

    let logits = Mean(Duration::ZERO).forward(&[&pixels]).unwrap().remove(0);
    assert!((logits[0] - 0.2).abs() < 1e-6);

    let best = top(&logits, 5).unwrap();
    assert_eq!((best.len(), best[0].label_id), (2, 0));
    assert!((best[0].confidence - 0.549_834).abs() < 1e-5);

    let context = Context {
        instance: "host-a".to_owned(),
        model: "mean".to_owned(),
        weights: "5f2b9c41aa0700".to_owned(),
        label_set: "two".to_owned(),
        precision: "fp32".to_owned(),
        device: "cpu".to_owned(),
        labels: vec![(None, "bright".to_owned()), (None, "dark".to_owned())],
    };
    let event = Event::frame(&meta, 1, &best, &context, now);
    let json: serde_json::Value =
        serde_json::from_str(&event.envelope("01JH8Z6Q3K5V9W2X4Y6Z8A0B2C", 42)).unwrap();
    assert_eq!(json["id"], "01JH8Z6Q3K5V9W2X4Y6Z8A0B2C-00000000000000000042");
    assert_eq!(json["data"]["top"][0]["label"], "bright");
    assert_eq!(json["data"]["quality"]["mean_luma"], 0.2);
    assert_eq!(json["data"]["quality"]["flags"][0], "uniform");
    assert_eq!((&json["data"]["epoch"], &json["data"]["frame"]), (&3.into(), &7.into()));

    assert_eq!((stream.in_flight(), stream.unaccounted()), (1, 0));
    meta.stream.published();
    assert_eq!((stream.in_flight(), stream.unaccounted()), (0, 0));
}
