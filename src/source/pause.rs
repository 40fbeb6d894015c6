//! Waiting for a while, or until a stop token fires, without a runtime.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

/// Sleeps for `duration`, or until the token fires. Needs no runtime.
pub fn wait(stop: &CancellationToken, duration: Duration) {
    let deadline = Instant::now() + duration;
    while !stop.is_cancelled() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        pause(stop, left);
    }
}

/// Sleeps for `duration`, or until the token fires, or the thread is unparked.
pub(super) fn pause(stop: &CancellationToken, duration: Duration) {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cancelled = pin!(stop.cancelled());
    if cancelled.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
        thread::park_timeout(duration);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
