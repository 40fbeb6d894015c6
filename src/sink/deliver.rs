//! The loop of a sink: connect, deliver in order, move the cursor on acknowledgements, back off.
//!
//! At least once, because the cursor moves only when the broker has answered; in order, because
//! nothing is sent beyond a message that was not acknowledged; and nothing is lost while a broker is
//! away, because what is not delivered stays in the journal.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    jitter,
    sink::{
        broker::{Acks, Broker, Code, Fault, Message},
        dead::DeadLetters,
        feed::Part,
        progress::Progress,
    },
};

/// The first wait after a failure is at most this long.
const FIRST: Duration = Duration::from_millis(500);
/// No wait is longer; a broker that comes back is found this soon.
const LONGEST: Duration = Duration::from_secs(15);
/// A refused login is not tried again sooner: some servers lock out who tries too often.
const AFTER_AUTH: Duration = Duration::from_secs(30);
/// How often the same trouble is logged.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// How long a stopping sink tries to deliver what is left; the rest stays in the journal.
pub const GRACE: Duration = Duration::from_secs(5);

/// Told of every acknowledgement.
pub trait Watch: Send + Sync {
    /// The broker has acknowledged a message of `sink`, `took` after it was handed over, and
    /// `since_arrival` after its frame had arrived, if it is a frame's.
    fn acked(&self, sink: &str, took: Duration, since_arrival: Option<Duration>);
}

/// What a sink's loop needs besides its broker.
pub struct Delivery {
    /// How it stands.
    pub progress: Arc<Progress>,
    /// Where messages go that the broker will never take.
    pub dead: DeadLetters,
    /// Told of every acknowledgement.
    pub watch: Arc<dyn Watch>,
    /// Deliver what is there, then end.
    pub stop: CancellationToken,
}

/// A part on its way, and how many of its messages are delivered.
struct Pending {
    part: Part,
    done: usize,
}

impl Delivery {
    /// Delivers until there are no more parts, or until [`GRACE`] after the stop.
    ///
    /// # Errors
    /// Whoever reads what is written has gone for good ([`Code::Closed`]).
    pub async fn run(
        mut self,
        mut broker: impl Broker,
        mut parts: mpsc::Receiver<Part>,
    ) -> anyhow::Result<()> {
        let stop = self.stop.clone();
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            result = self.deliver(&mut broker, &mut parts) => {
                broker.close().await;
                result
            }
            () = late => {
                tracing::warn!(sink = self.name(), "stopped before everything was delivered; the rest follows after the next start");
                Ok(())
            }
        }
    }

    fn name(&self) -> &str {
        self.progress.cursor.sink()
    }

    async fn deliver(
        &mut self,
        broker: &mut impl Broker,
        parts: &mut mpsc::Receiver<Part>,
    ) -> anyhow::Result<()> {
        let mut pending = None;
        let mut trouble = Trouble::default();
        loop {
            let fault = match broker.connect().await {
                Ok(()) => {
                    self.progress.connected();
                    match self.serve(broker, parts, &mut pending, &mut trouble).await {
                        None => {
                            trouble.say_rest(self.name());
                            return Ok(());
                        }
                        Some(fault) => fault,
                    }
                }
                Err(fault) => fault,
            };
            self.progress.broken(&fault);
            if fault.code == Code::Closed {
                return Err(fault.error);
            }
            let wait = trouble.wait(&fault);
            trouble.say(self.name(), &fault, wait);
            tokio::select! {
                () = tokio::time::sleep(wait) => self.progress.retries.fetch_add(1, Relaxed),
                // A broker that is away is not waited for: what is left stays in the journal.
                () = self.stop.cancelled() => {
                    trouble.say_rest(self.name());
                    return Ok(());
                }
            };
        }
    }

    /// Delivers over one connection. `None` iff there are no more parts.
    async fn serve(
        &mut self,
        broker: &mut impl Broker,
        parts: &mut mpsc::Receiver<Part>,
        pending: &mut Option<Pending>,
        trouble: &mut Trouble,
    ) -> Option<Fault> {
        loop {
            if pending.is_none() {
                self.progress.waiting(None);
                let part = tokio::select! {
                    part = parts.recv() => part?,
                    fault = broker.lost() => return Some(fault),
                };
                self.progress.lost.fetch_add(part.lost, Relaxed);
                *pending = Some(Pending { part, done: 0 });
            }
            let it = pending.as_mut().expect("it was just filled");
            let before = it.done;
            let result = self.part(broker, it).await;
            if before < it.done {
                trouble.over(self.name());
            }
            match result {
                Ok(()) => {
                    self.progress.cursor.advance(it.part.cursor);
                    *pending = None;
                }
                Err(fault) if fault.code == Code::TooLarge => {
                    let message = &it.part.messages[it.done];
                    if let Err(fault) = self.set_aside(message, &fault, trouble) {
                        return Some(fault);
                    }
                    it.done += 1;
                }
                Err(fault) => return Some(fault),
            }
        }
    }

    /// Delivers what is left of a part, and counts what is acknowledged of it.
    async fn part(&self, broker: &mut impl Broker, it: &mut Pending) -> Result<(), Fault> {
        let messages = &it.part.messages[it.done..];
        let progress = &self.progress;
        progress.waiting(messages.first());
        if messages.is_empty() {
            return Ok(());
        }
        progress.sent.fetch_add(messages.len() as u64, Relaxed);
        let start = Instant::now();
        let mut told = |index: usize, duplicate: bool| {
            let message: &Message = &messages[index];
            progress.cursor.advance(message.seq);
            progress.waiting(messages.get(index + 1));
            progress.acked.fetch_add(1, Relaxed);
            progress.duplicates.fetch_add(u64::from(duplicate), Relaxed);
            let age = || progress.cursor.age(message.seq, message.appended);
            let since_arrival = message.took().map(|it| it + age());
            self.watch.acked(self.name(), start.elapsed(), since_arrival);
        };
        let mut acks = Acks::new(&mut told);
        let result = broker.deliver(messages, &mut acks).await;
        let acked = acks.count();
        it.done += acked;
        // A broker that says it is done without having acknowledged everything is not believed.
        match result {
            Ok(()) if it.done < it.part.messages.len() => Err(Fault::new(
                Code::Error,
                anyhow::anyhow!("{acked} messages acknowledged, and then no more"),
            )),
            other => other,
        }
    }

    fn set_aside(
        &mut self,
        message: &Message,
        fault: &Fault,
        trouble: &mut Trouble,
    ) -> Result<(), Fault> {
        self.progress.failed(Code::TooLarge);
        self.dead.write(message).map_err(|it| Fault::new(Code::Error, it))?;
        self.progress.dead.fetch_add(1, Relaxed);
        self.progress.cursor.advance(message.seq);
        if let Some(more) = trouble.aside.count(Instant::now()) {
            tracing::error!(
                sink = self.name(), id = message.id, file = %self.dead.path().display(), more,
                "the broker does not take an event, it was set aside: {fault}"
            );
        }
        Ok(())
    }
}

/// Failures without a success between.
#[derive(Default)]
struct Trouble {
    failures: u32,
    /// When it was logged last. Kept when all is well again, or a broker that takes one message
    /// and then fails would fill the log.
    said: Option<Instant>,
    /// It was logged, and nothing was delivered since.
    open: bool,
    /// Events that were set aside.
    aside: Aside,
}

/// Events that were set aside one after the other: thousands may be too large.
#[derive(Default)]
struct Aside {
    said: Option<Instant>,
    /// How many were not logged.
    unsaid: u64,
}

impl Aside {
    /// Counts one. If it is to be logged: how many were not since the last that was.
    fn count(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|it| now < it + SAY_EVERY) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

impl Trouble {
    /// How long to wait: up to twice as long each time, with full jitter, so that many daemons do
    /// not come back to a broker at the same moment.
    fn wait(&mut self, fault: &Fault) -> Duration {
        let most = match fault.code {
            Code::Auth => return fault.retry_after.unwrap_or(AFTER_AUTH),
            _ => (FIRST * 2_u32.pow(self.failures.min(10))).min(LONGEST),
        };
        self.failures += 1;
        fault.retry_after.unwrap_or_else(|| most.mul_f64(jitter::random()))
    }

    fn say(&mut self, sink: &str, fault: &Fault, wait: Duration) {
        if self.said.is_none_or(|it| SAY_EVERY <= it.elapsed()) {
            let next_try_s = wait.as_secs_f64();
            tracing::error!(sink, next_try_s, "events wait in the journal: {fault}");
            self.said = Some(Instant::now());
            self.open = true;
        }
    }

    /// The sink ends: what was not logged is.
    fn say_rest(&mut self, sink: &str) {
        let more = std::mem::take(&mut self.aside.unsaid);
        if 0 < more {
            tracing::error!(sink, more, "the broker does not take events, they were set aside");
        }
    }

    /// Something was delivered.
    fn over(&mut self, sink: &str) {
        self.failures = 0;
        if std::mem::take(&mut self.open) {
            tracing::info!(sink, "delivers again");
        }
    }
}

#[cfg(test)]
#[path = "deliver_tests.rs"]
mod tests;
