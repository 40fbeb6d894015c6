//! One integration test binary; each module tests one promise.

#![allow(clippy::unwrap_used, reason = "helpers outside `#[test]` functions too")]

mod end_to_end;
mod golden;
mod http;
mod journal;
mod journal_daemon;
mod one_frame;
mod pipeline;
mod shipped;
mod shutdown;
mod soak;
mod source;
mod source_live;
mod support;
mod support_rtsp;
mod systemd;
mod tidy;
