//! Sources that open nothing: all that there is to do for their streams is to say how they stand.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
    time::Duration,
};

use serde_json::Value;

use crate::{
    config::plan::Plan,
    edge::WhenFull,
    frame::{Code, State},
    journal::read::Reader,
    ledger::Stream,
    pipeline::{Added, Pipeline},
    source::{self, Opener, Source, SourceError, supervise::Leave},
};

/// Says something of a stream, and nothing more. `before` is told of the source first.
///
/// # Errors
/// The operating system refused a thread.
pub(super) fn say(
    pipeline: &mut Pipeline,
    stream: &Arc<Stream>,
    leave: Leave,
    before: impl FnOnce(&Added),
) -> anyhow::Result<Added> {
    let settings = source::Settings {
        max_fps: None,
        looped: false,
        start_time: None,
        max_clock_offset: Duration::ZERO,
        first_epoch: 0,
        gate: Arc::default(),
        leave: Arc::new(OnceLock::from(leave)),
    };
    let edge = (WhenFull::Block, 1);
    pipeline.add_source(Box::new(Mute), stream.clone(), settings, edge, |added| {
        added.stop.cancel();
        before(added);
    })
}

struct Mute;

impl Opener for Mute {
    fn open(&mut self) -> Result<Box<dyn Source>, SourceError> {
        Err(SourceError { code: Code::Error, detail: "there is nothing to open".to_owned() })
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// The streams of the last run that are not configured any more and have not said that they are gone:
/// they were held back, or had ended, or the daemon was killed.
pub(super) fn left_before(plan: &Plan) -> BTreeSet<String> {
    let left = |json: String| {
        let event: Value = serde_json::from_str(&json).ok()?;
        let (id, state) = (event["data"]["stream"].as_str()?, event["data"]["state"].as_str()?);
        let left = state != State::Removed.name() && !plan.streams.contains_key(id);
        left.then(|| id.to_owned())
    };
    match Reader::open(&plan.journal.path).and_then(|it| it.last_states()) {
        Ok(states) => states.into_iter().filter_map(left).collect(),
        Err(error) => {
            tracing::warn!(%error, "which streams were there before is not known");
            BTreeSet::new()
        }
    }
}
