//! Which events a sink gets, and how much of them.

use crate::{
    event::Kind,
    journal::{
        filter::Filter,
        read::{Gap, Record},
    },
    sink::{
        broker::{Message, Topic},
        settings::Select,
    },
};

impl Select {
    /// What this sink gets of an event; `None` if nothing. Events of kinds that a later version
    /// wrote are not for this one to pass on.
    pub fn message(&self, record: Record) -> Option<Message> {
        let topic = Topic::of(record.kind?);
        let named = |it: &String| Some(it) == record.stream.as_ref();
        if !self.wants(topic) || !self.streams.is_empty() && !self.streams.iter().any(named) {
            return None;
        }
        let sure = Filter { min_confidence: self.min_confidence, ..Filter::default() };
        let frame = Kind::FrameClassified;
        if topic == Topic::Frames && !sure.matches(Some(frame), None, &record.json) {
            return None;
        }
        let json = match self.top {
            Some(most) if topic == Topic::Frames => shortened(&record.json, most),
            _ => record.json,
        };
        let id = id(&json)?.to_owned();
        let (seq, stream) = (record.seq, record.stream);
        Some(Message { seq, id, topic, stream, json, appended: record.appended })
    }

    /// What tells this sink of events that it will never get; `None` if it does not want to know.
    pub fn gap(&self, gap: &Gap, journal: &str, source: &str) -> Option<Message> {
        self.wants(Topic::Gap).then(|| Message {
            seq: gap.last,
            id: gap.id(journal),
            topic: Topic::Gap,
            stream: None,
            json: gap.event(journal, source),
            appended: std::time::SystemTime::now(),
        })
    }

    fn wants(&self, topic: Topic) -> bool {
        self.topics.is_empty() || self.topics.contains(&topic)
    }
}

/// The event's id. Every event begins with the same two fields, so nothing is parsed for it.
fn id(json: &str) -> Option<&str> {
    let rest = json.strip_prefix(r#"{"specversion":"1.0","id":""#)?;
    rest.split_once('"').map(|it| it.0)
}

/// The event with at most `most` labels; all else is as it was.
fn shortened(json: &str, most: usize) -> String {
    let Ok(mut event) = serde_json::from_str::<serde_json::Value>(json) else {
        return json.to_owned();
    };
    match event.pointer_mut("/data/top") {
        Some(serde_json::Value::Array(top)) if most < top.len() => top.truncate(most),
        _ => return json.to_owned(),
    }
    event.to_string()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn record(kind: Kind, stream: Option<&str>, confidence: f32) -> Record {
        let json = format!(
            r#"{{"specversion":"1.0","id":"J-7","data":{{"a":1.50,"top":[{{"label":"x","confidence":{confidence}}},{{"label":"y","confidence":0.1}}],"z":0}}}}"#
        );
        let stream = stream.map(str::to_owned);
        Record { seq: 7, kind: Some(kind), stream, json, appended: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn each_part_that_is_set_must_hold_and_confidence_is_for_frames() {
        let yard =
            Select { streams: vec!["yard".into()], min_confidence: Some(0.5), ..Select::default() };
        let check = |select: &Select, kind, stream, confidence, wanted: bool| {
            let got = select.message(record(kind, stream, confidence));
            assert_eq!(got.is_some(), wanted, "{select:?} {kind:?} {stream:?} {confidence}");
        };
        use Kind::{Daemon, FrameClassified, StreamState};
        check(&Select::default(), Daemon, None, 0.0, true);
        check(&yard, FrameClassified, Some("yard"), 0.5, true);
        check(&yard, FrameClassified, Some("yard"), 0.4, false);
        check(&yard, FrameClassified, Some("front"), 0.9, false);
        check(&yard, StreamState, Some("yard"), 0.0, true);
        check(&yard, Daemon, None, 0.0, false);
        let states = Select { topics: vec![Topic::State], ..Select::default() };
        check(&states, StreamState, Some("yard"), 0.0, true);
        check(&states, FrameClassified, Some("yard"), 0.9, false);
        let mut later = record(Daemon, None, 0.0);
        later.kind = None;
        assert_eq!(Select::default().message(later), None);
    }

    #[test]
    fn fewer_labels_leave_the_rest_of_the_event_as_it_was() {
        let one = Select { top: Some(1), ..Select::default() };
        let got = one.message(record(Kind::FrameClassified, Some("a"), 0.25)).unwrap();
        assert_eq!(
            got.json,
            r#"{"specversion":"1.0","id":"J-7","data":{"a":1.5,"top":[{"label":"x","confidence":0.25}],"z":0}}"#
        );
        assert_eq!((got.seq, got.id.as_str(), got.journal()), (7, "J-7", "J"));
        let whole = record(Kind::FrameClassified, Some("a"), 0.25);
        let two = Select { top: Some(2), ..Select::default() };
        assert_eq!(two.message(whole.clone()).unwrap().json, whole.json, "untouched");
    }
}
