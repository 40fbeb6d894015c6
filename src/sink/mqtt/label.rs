//! The best label of a frame, as it is kept on the broker for each stream.

use serde::{Deserialize, Serialize};

use crate::sink::broker::Message;

/// What a subscriber gets at once: the label, since when, and the event that it comes from.
#[derive(Debug, Serialize)]
pub(super) struct Label {
    stream: String,
    /// The class; what "changed" is about.
    pub(super) label_id: u32,
    label: String,
    confidence: f64,
    time: String,
    id: String,
}

#[derive(Deserialize)]
struct Event {
    time: String,
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    top: Vec<Best>,
}

#[derive(Deserialize)]
struct Best {
    label_id: u32,
    label: String,
    confidence: f64,
}

impl Label {
    /// `None` if the message is not a frame of a stream with at least one label.
    pub(super) fn of(message: &Message) -> Option<Label> {
        let stream = message.stream.clone()?;
        let event: Event = serde_json::from_str(&message.json).ok()?;
        let Best { label_id, label, confidence } = event.data.top.into_iter().next()?;
        let id = message.id.clone();
        Some(Label { stream, label_id, label, confidence, time: event.time, id })
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).expect("plain fields always make JSON")
    }
}
