//! The golden JSON of every kind of event, and that the printed schema takes it.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use expect_test::expect;

use super::*;
use crate::{
    frame::{Code, Dated, EpochEnd, Skipped, State, TimeSource, Timing},
    health::{Flag, Flags, Quality, Settings, measure::measure},
    ledger::{InFlight, Stream},
    stage::Reason,
};

const JOURNAL: &str = "01JH8Z6Q3K5V9W2X4Y6Z8A0B2C";

fn at(micros: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(micros)
}

fn frame() -> Event {
    let arrived = Instant::now();
    let after = |micros| arrived + Duration::from_micros(micros);
    let mut skipped = Skipped::default();
    (0..4).for_each(|_| skipped.add(Reason::Rate));
    skipped.add(Reason::Overload);
    let meta = Meta {
        stream: InFlight::decoded(Arc::new(Stream::new("front"))),
        epoch: 3,
        frame: 184_820,
        pts: Duration::from_millis(61_606_700),
        time: at(1_795_485_312_301_234),
        dated: Dated {
            source: TimeSource::Rtcp,
            error: Some(Duration::from_micros(43_001)),
            clock_offset_ns: Some(-12_500_001),
        },
        ingest_time: at(1_795_485_312_345_678),
        size: (1920, 1080),
        timing: Timing {
            decoded: after(4100),
            taken: after(5300),
            preprocessed: after(6100),
            started: after(7000),
            inferred: after(13400),
            ..Timing::at(arrived, after(4100))
        },
        skipped,
        quality: Quality { look: Some(measure(&[104; 16 * 16 * 3], 16)), flags: vec![Flag::Dark] },
    };
    let context = Context {
        instance: "host-a".into(),
        model: "ghostnet_1x".into(),
        weights: "5f2b9c41aa07deadbeef".into(),
        label_set: "imagenet-1k".into(),
        precision: "fp32".into(),
        device: "cpu".into(),
        labels: vec![
            (Some("n01440764".into()), "tench".into()),
            (None, "one \"with\" a\nline end".into()),
        ],
    };
    let top =
        [Ranked { label_id: 0, confidence: 0.612_345_4 }, Ranked { label_id: 1, confidence: 1e-7 }];
    Event::frame(&meta, 16, &top, &context, after(13440))
}

fn state(ended: Option<EpochEnd>) -> Event {
    let change = StateChange {
        stream: Arc::new(Stream::new("front")),
        state: State::Down,
        code: Some(Code::Timeout),
        detail: Some("no answer in 5 s".into()),
        log: vec!["WARN rtspsrc src: no answer (3 times)".into()],
        attempt: 2,
        retry_in: Some(Duration::from_millis(1500)),
        at: at(1_795_485_312_000_001),
        since: at(1_795_485_312_000_001),
        flags: Flags::default(),
        ended,
    };
    Event::state("host-a", &change, Some("up"))
}

/// A stream goes on, and its picture is frozen from now on.
fn with_flag() -> Event {
    let stream = Arc::new(Stream::watched("front", Settings::default()));
    let look = measure(&[104; 16 * 16 * 3], 16);
    let meta = |at_s: u64| {
        let arrived = Instant::now() + Duration::from_secs(at_s);
        Meta {
            stream: InFlight::decoded(stream.clone()),
            epoch: 3,
            frame: at_s,
            pts: Duration::from_secs(at_s),
            time: at(at_s * 1_000_000),
            dated: Dated { source: TimeSource::Arrival, error: None, clock_offset_ns: None },
            ingest_time: at(at_s * 1_000_000),
            size: (16, 16),
            timing: Timing::at(arrived, arrived),
            skipped: Skipped::default(),
            quality: Quality { look: Some(look.clone()), flags: Vec::new() },
        }
    };
    let see = |at_s| stream.health().seen(&mut meta(at_s), &stream);
    let changes: Vec<_> = [0, 1, 2, 20, 40].into_iter().filter_map(see).collect();
    let [_, frozen] = &changes[..] else { panic!("one colour, then frozen: {changes:?}") };
    Event::state("host-a", frozen, Some("up"))
}

#[test]
fn a_raised_flag_is_the_published_json() {
    expect![[r#"{"stream":"front","state":"up","previous":"up","since":"1970-01-01T00:00:40.000000Z","flags":[{"name":"frozen","since":"1970-01-01T00:00:00.000000Z"},{"name":"uniform","since":"1970-01-01T00:00:00.000000Z"}],"attempt":1}"#]]
    .assert_eq(&with_flag().data);
}

#[test]
fn a_frame_event_is_the_published_json() {
    expect![[r#"{"specversion":"1.0","id":"01JH8Z6Q3K5V9W2X4Y6Z8A0B2C-00000000000001848201","source":"/ghostwatch/host-a/streams/front","type":"io.ghostwatch.frame.classified.v1","subject":"front","time":"2026-11-24T01:55:12.301234Z","datacontenttype":"application/json","dataschema":"urn:ghostwatch:schema:frame-classified:1","sequence":"00000000000001848201","data":{"stream":"front","region":"default","epoch":3,"frame":184820,"pts_ns":61606700000000,"time_source":"rtcp","time_error_ms":44,"clock_offset_ms":-13,"ingest_time":"2026-11-24T01:55:12.345678Z","width":1920,"height":1080,"model":{"name":"ghostnet_1x","weights":"sha256:5f2b9c41aa07","labels":"imagenet-1k","precision":"fp32"},"device":"cpu","batch_size":16,"top":[{"rank":1,"label_id":0,"wnid":"n01440764","label":"tench","confidence":0.612345},{"rank":2,"label_id":1,"label":"one \"with\" a\nline end","confidence":0.0}],"skipped":{"rate":4,"overload":1},"quality":{"mean_luma":0.408,"flags":["dark"]},"latency_us":{"decode":4100,"queue":1200,"preprocess":800,"batch_wait":900,"inference":6400,"postprocess":40,"total":13440}}}"#]]
    .assert_eq(&frame().envelope(JOURNAL, 1_848_201));
}

#[test]
fn a_state_event_is_the_published_json() {
    let mut skipped = Skipped::default();
    skipped.add(Reason::Stale);
    let ended = EpochEnd { epoch: 3, frames: 100, skipped };
    expect![[r#"{"specversion":"1.0","id":"01JH8Z6Q3K5V9W2X4Y6Z8A0B2C-00000000000000000007","source":"/ghostwatch/host-a/streams/front","type":"io.ghostwatch.stream.state.v1","subject":"front","time":"2026-11-24T01:55:12.000001Z","datacontenttype":"application/json","dataschema":"urn:ghostwatch:schema:stream-state:1","sequence":"00000000000000000007","data":{"stream":"front","state":"down","previous":"up","since":"2026-11-24T01:55:12.000001Z","flags":[],"code":"timeout","detail":"no answer in 5 s","log":["WARN rtspsrc src: no answer (3 times)"],"attempt":2,"next_retry_at":"2026-11-24T01:55:13.500001Z","epoch":3,"frame":99,"skipped":{"stale":1}}}"#]]
    .assert_eq(&state(Some(ended)).envelope(JOURNAL, 7));
}

#[test]
fn the_schema_takes_every_event_and_refuses_others() {
    let schema = schema();
    let validator = jsonschema::draft202012::options()
        .should_validate_formats(true)
        .build(&schema)
        .expect("the schema is valid");
    let mut events = vec![
        frame().envelope(JOURNAL, 1),
        state(None).envelope(JOURNAL, 2),
        state(Some(EpochEnd { epoch: 0, frames: 1, skipped: Skipped::default() }))
            .envelope(JOURNAL, 3),
        Event::gap("host-a", (1, 4), GapReason::Expired, None)
            .envelope_with(&format!("{JOURNAL}-{}-gap", sequence(4)), 4),
        Event::gap("host-a", (5, 5), GapReason::Damaged, None).envelope(JOURNAL, 5),
        Event::gap(
            "host-a",
            (1, 0),
            GapReason::Damaged,
            Some(Elsewhere { journal: Some(JOURNAL), moved_to: Some("/x"), detail: "no database" }),
        )
        .envelope(JOURNAL, 1),
    ];
    events.push(with_flag().envelope(JOURNAL, 4));
    for it in DaemonState::ALL {
        events.push(Event::daemon("a host/ü", it, Some("detail")).envelope(JOURNAL, 6));
        events.push(Event::daemon("host", it, None).envelope(JOURNAL, 6));
    }
    for event in events {
        let value = serde_json::from_str(&event).expect("events are JSON");
        let errors: Vec<_> = validator.iter_errors(&value).map(|it| it.to_string()).collect();
        assert!(errors.is_empty(), "{event}: {errors:?}");
    }
    let frame = frame().envelope(JOURNAL, 1);
    for (good, bad) in [
        ("\"epoch\":3", "\"epoch\":-1"),
        ("\"time_error_ms\":44", "\"time_error_ms\":-1"),
        ("\"clock_offset_ms\":-13", "\"clock_offset_ms\":-12.5"),
        ("\"overload\":1", "\"overload\":0"),
        ("\"overload\":1", "\"boredom\":1"),
        ("[\"dark\"]", "[\"boring\"]"),
        ("\"confidence\":0.612345", "\"confidence\":1.5"),
        ("frame.classified.v1", "frame.classified.v2"),
        ("frame-classified:1", "stream-state:1"),
        ("\"device\":\"cpu\",", ""),
        ("\"subject\":\"front\",", ""),
        ("01JH8Z6Q3K5V9W2X4Y6Z8A0B2C-0", "0"),
    ] {
        assert!(frame.contains(good), "{good} is not in the event");
        let value = serde_json::from_str(&frame.replacen(good, bad, 1)).expect("still JSON");
        assert!(!validator.is_valid(&value), "{bad} was taken");
    }
}

#[test]
fn kinds_are_found_by_number_and_by_either_name() {
    for it in Kind::ALL {
        assert_eq!(Kind::from_code(it as i64), Some(it));
        assert_eq!(Kind::from_name(it.name()), Some(it));
    }
    assert_eq!(Kind::from_name("frame.classified"), Some(Kind::FrameClassified));
    assert_eq!(Kind::from_name("frame"), None);
    assert_eq!(Kind::from_code(0), None);
}

#[test]
fn a_source_is_a_uri_reference_whatever_the_host_is_called() {
    assert_eq!(source("host-a", Some("front")), "/ghostwatch/host-a/streams/front");
    assert_eq!(source("a b/ü", None), "/ghostwatch/a%20b%2F%C3%BC");
}
