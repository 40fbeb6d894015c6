//! One integration test binary; each module tests one promise.

#![allow(clippy::unwrap_used, reason = "helpers outside `#[test]` functions too")]

mod end_to_end;
mod golden;
mod http;
mod journal;
#[cfg(feature = "kafka")]
mod kafka;
mod mqtt;
mod one_frame;
mod pipeline;
mod shutdown;
mod sink_rates;
mod source;
mod source_live;
mod support;
mod support_rtsp;
mod support_server;
mod support_tls;
mod systemd;
mod tidy;
