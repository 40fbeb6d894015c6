//! The postprocess stage's loop: from scores to labels, in the order of the batches.

use std::time::Instant;

use crate::{
    edge::{Receiver, Sender},
    frame::{Item, Meta, Scores, StateChange},
    health::Flag,
    infer::batch::Ticket,
    ledger::dropped,
    postprocess::{Ranked, top},
    pulse::Pulse,
    stage::{Reason, StageName},
};

/// A frame with its best labels, ready to be published.
#[derive(Debug)]
pub struct Labelled {
    /// Identity.
    pub meta: Meta,
    /// Best first.
    pub top: Vec<Ranked>,
    /// How many frames were in the batch.
    pub batch_size: u32,
    /// When the labels were known.
    pub labelled: Instant,
}

/// Labels every answer until the batcher is gone.
///
/// # Errors
/// A lane ended without an answer.
pub fn run(
    k: usize,
    tickets: Receiver<Ticket>,
    output: Sender<Item<Labelled>>,
    pulse: &Pulse,
) -> anyhow::Result<()> {
    while let Some(ticket) = tickets.recv_turning(|| pulse.beat()) {
        // A lane that hangs is seen by its own pulse.
        let Some(items) = ticket.recv_turning(|| pulse.beat()) else {
            anyhow::bail!("a lane ended without an answer");
        };
        for item in items {
            let item = match item {
                Item::State(mut change) => {
                    change.stream.clone().health().changed(&mut change);
                    Item::State(change)
                }
                Item::Dropped(meta, reason) => Item::Dropped(meta, reason),
                Item::Frame(mut scores) => {
                    let stream = scores.meta.stream.stream().clone();
                    let news = stream.health().seen(&mut scores.meta, &stream);
                    if let Some(change) = news
                        && output.send(tell(change)).is_err()
                    {
                        return Ok(());
                    }
                    if stream.health().labels(&scores.meta.quality.flags) {
                        label(scores, k)
                    } else {
                        dropped(scores.meta, StageName::Postprocess, Reason::Corrupt)
                    }
                }
            };
            if output.send(item).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Sends on what holds for a stream's pictures from now on.
fn tell(change: StateChange) -> Item<Labelled> {
    let stream = &change.stream.id;
    let holds = change.flags.iter().map(|it| it.0);
    let flags: Vec<_> = holds.filter(|it| *it != Flag::Degraded).map(Flag::name).collect();
    match change.flags.rates() {
        Some(it) => {
            let (effective_mfps, wanted_mfps) = (it.effective_mfps, it.wanted_mfps);
            tracing::warn!(
                stream,
                effective_fps = effective_mfps as f64 / 1e3,
                wanted_fps = wanted_mfps as f64 / 1e3,
                ?flags,
                "there is too much to do: pictures give way to newer ones"
            );
        }
        None if flags.is_empty() => tracing::info!(stream, "the pictures are fine again"),
        None => tracing::warn!(stream, ?flags, "something is wrong with the pictures"),
    }
    change.stream.state_sent();
    Item::State(Box::new(change))
}

fn label(scores: Scores, k: usize) -> Item<Labelled> {
    let Scores { meta, logits, batch_size } = scores;
    match top(&logits, k) {
        Ok(top) => Item::Frame(Labelled { meta, top, batch_size, labelled: Instant::now() }),
        Err(reject) => {
            tracing::warn!(stream = meta.stream.id, frame = meta.frame, %reject, "no label");
            dropped(meta, StageName::Postprocess, Reason::Error)
        }
    }
}
