//! One integration test binary; each module tests one promise.

#![allow(clippy::unwrap_used, reason = "helpers outside `#[test]` functions too")]

mod control;
mod end_to_end;
mod events;
mod failures;
mod golden;
#[cfg(feature = "libtorch")]
mod gpu_check;
mod health;
mod http;
mod instructions;
mod journal;
mod journal_daemon;
#[cfg(feature = "kafka")]
mod kafka;
#[cfg(feature = "kafka")]
mod kafka_login;
#[cfg(feature = "libtorch")]
mod libtorch;
mod monitoring;
mod mqtt;
#[cfg(feature = "native")]
mod native;
mod nats;
mod one_frame;
mod outages;
mod overload;
mod pipeline;
mod probe;
mod readme;
mod redis;
mod reload;
mod secrets;
mod shipped;
mod shutdown;
mod sink_figures;
mod sink_rates;
mod sinks;
mod sinks_daemon;
mod sinks_reload;
mod soak;
mod source;
mod source_damage;
mod source_device;
mod source_formats;
mod source_gate;
mod source_hostile;
mod source_http;
mod source_live;
mod source_media;
mod source_thin;
mod source_time;
mod source_tls;
mod speed_figures;
mod support;
mod support_broker;
mod support_camera;
mod support_http;
#[cfg(feature = "kafka")]
mod support_kafka;
mod support_media;
mod support_proxy;
mod support_rtp_camera;
mod support_rtsp;
mod support_server;
mod support_sinks;
mod support_tls;
mod systemd;
mod tidy;
mod webhook;
