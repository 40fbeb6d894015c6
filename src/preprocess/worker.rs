//! The preprocess workers' loop: from jobs to model inputs, each with its own scratch memory.

use std::time::Instant;

use crate::{
    edge::Receiver,
    frame::{Frame, Input, Item},
    health::measure::measure,
    infer::batch::Job,
    ledger::dropped,
    preprocess::{Geometry, Preprocessor},
    pulse::Pulse,
    stage::{Reason, StageName},
};

/// Turns jobs into inputs until the batcher is gone. Pixel buffers come from `spare` when one is
/// there.
///
/// # Errors
/// Never. Every stage has this signature.
pub fn run(
    geometry: Geometry,
    jobs: Receiver<Job>,
    spare: Receiver<Box<[u8]>>,
    pulse: &Pulse,
) -> anyhow::Result<()> {
    let bytes = geometry.crop * geometry.crop * 3;
    let mut preprocessor = Preprocessor::new(geometry);
    while let Some(Job { frame, reply }) = jobs.recv_turning(|| pulse.beat()) {
        let Frame { mut meta, picture } = frame;
        let mut pixels = spare.try_recv().unwrap_or_else(|| vec![0; bytes].into_boxed_slice());
        let result = preprocessor.run(&picture, &mut pixels);
        // The decoder gets its buffer back before the batch runs.
        drop(picture);
        if result.is_ok() {
            meta.quality.look = Some(measure(&pixels, geometry.crop));
        }
        meta.timing.preprocessed = Instant::now();
        let item = match result {
            Ok(()) => Item::Frame(Input { meta, pixels }),
            Err(reject) => {
                tracing::debug!(stream = meta.stream.id, frame = meta.frame, %reject, "rejected");
                dropped(meta, StageName::Preprocess, Reason::Error)
            }
        };
        // A lane that is gone has told why itself.
        drop(reply.send(item));
    }
    Ok(())
}
