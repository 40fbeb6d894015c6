//! Which events a reader wants. Pure; used by `tail` and the HTTP API alike.

use std::borrow::Cow;

use serde::Deserialize;

use crate::event::Kind;

/// Which events a reader wants: those for which every part that is set holds.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of one of these streams; of any, and of the daemon, if empty.
    pub streams: Vec<String>,
    /// Whose best label has this name or WordNet id, upper and lower case being equal. Only
    /// frames have one.
    pub label: Option<String>,
    /// Whose best label has at least this confidence. Only frames have one.
    pub min_confidence: Option<f32>,
    /// Of this kind.
    pub kind: Option<Kind>,
}

#[derive(Deserialize)]
struct Peek<'a> {
    #[serde(borrow)]
    data: PeekData<'a>,
}

#[derive(Deserialize)]
struct PeekData<'a> {
    #[serde(borrow, default)]
    top: Vec<PeekLabel<'a>>,
}

#[derive(Deserialize)]
struct PeekLabel<'a> {
    #[serde(borrow)]
    label: Cow<'a, str>,
    #[serde(borrow, default)]
    wnid: Option<Cow<'a, str>>,
    confidence: f32,
}

impl Filter {
    /// Whether an event passes. `kind` is `None` iff a later version wrote the event.
    pub fn matches(&self, kind: Option<Kind>, stream: Option<&str>, json: &str) -> bool {
        if self.kind.is_some() && self.kind != kind {
            return false;
        }
        if !self.streams.is_empty() && !self.streams.iter().any(|it| Some(&**it) == stream) {
            return false;
        }
        if self.label.is_none() && self.min_confidence.is_none() {
            return true;
        }
        // Only now is the JSON read: most filters decide without it.
        let Ok(event) = serde_json::from_str::<Peek<'_>>(json) else {
            return false;
        };
        let Some(best) = event.data.top.first() else {
            return false;
        };
        let wanted = self.label.as_deref().is_none_or(|it| {
            same(it, &best.label) || best.wnid.as_deref().is_some_and(|wnid| same(it, wnid))
        });
        wanted && self.min_confidence.is_none_or(|it| it <= best.confidence)
    }
}

fn same(a: &str, b: &str) -> bool {
    a.eq_ignore_ascii_case(b) || a.to_lowercase() == b.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_that_is_set_must_hold() {
        let minivan = r#"{"id":"x","data":{"top":[{"rank":1,"wnid":"n03770679","label":"minivan",
            "confidence":0.6},{"rank":2,"label":"cab","confidence":0.3}]}}"#;
        let state = r#"{"data":{"state":"up"}}"#;
        let check = |filter: Filter, frame: bool, other: bool| {
            assert_eq!(
                filter.matches(Some(Kind::FrameClassified), Some("front"), minivan),
                frame,
                "{filter:?} on a frame"
            );
            assert_eq!(
                filter.matches(Some(Kind::StreamState), Some("yard"), state),
                other,
                "{filter:?} on a state"
            );
        };
        let all = Filter::default;
        let label = |it: &str| Filter { label: Some(it.into()), ..all() };
        check(all(), true, true);
        check(Filter { streams: vec!["yard".into()], ..all() }, false, true);
        check(Filter { streams: vec!["yard".into(), "front".into()], ..all() }, true, true);
        check(Filter { kind: Some(Kind::StreamState), ..all() }, false, true);
        check(label("Minivan"), true, false);
        check(label("n03770679"), true, false);
        check(label("cab"), false, false);
        check(Filter { min_confidence: Some(0.6), ..all() }, true, false);
        check(Filter { min_confidence: Some(0.61), ..all() }, false, false);
        check(Filter { min_confidence: Some(0.61), ..label("minivan") }, false, false);
    }
}
