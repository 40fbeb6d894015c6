//! One integration test binary; each module tests one promise.

#![allow(clippy::unwrap_used, reason = "helpers outside `#[test]` functions too")]

mod end_to_end;
mod golden;
mod http;
mod journal;
mod mqtt;
mod one_frame;
mod pipeline;
mod shutdown;
mod source;
mod source_live;
mod support;
mod support_rtsp;
mod support_server;
mod systemd;
mod tidy;
