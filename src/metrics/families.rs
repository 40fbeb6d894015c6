//! How metrics are made: their prefix, and the buckets of latencies.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};

/// Frame latencies and stage durations, in seconds.
const LATENCY: [f64; 13] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];

/// Adds a metric to a registry.
pub(crate) fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> C {
    registry.register(Box::new(collector.clone())).expect("each metric has a name of its own");
    collector
}

fn named(name: &str, help: &str) -> Opts {
    Opts::new(format!("ghostwatch_{name}"), help)
}

/// Why no constructor below can fail.
const VALID: &str = "metric names and labels are constants and valid";

/// A counter.
pub(crate) fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::with_opts(named(name, help)).expect(VALID)
}

/// Counters by labels.
pub(crate) fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    IntCounterVec::new(named(name, help), labels).expect(VALID)
}

/// A gauge of integers.
pub(crate) fn gauge(name: &str, help: &str) -> IntGauge {
    IntGauge::with_opts(named(name, help)).expect(VALID)
}

/// Gauges of integers by labels.
pub(crate) fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    IntGaugeVec::new(named(name, help), labels).expect(VALID)
}

/// A gauge.
pub(crate) fn real_gauge(name: &str, help: &str) -> Gauge {
    Gauge::with_opts(named(name, help)).expect(VALID)
}

/// Gauges by labels.
pub(crate) fn real_gauges(name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    GaugeVec::new(named(name, help), labels).expect(VALID)
}

/// A histogram.
pub(crate) fn histogram(name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let opts = HistogramOpts::from(named(name, help)).buckets(buckets.to_vec());
    Histogram::with_opts(opts).expect(VALID)
}

/// Histograms of latencies by labels.
pub(crate) fn histograms(name: &str, help: &str, labels: &[&str]) -> HistogramVec {
    let opts = HistogramOpts::from(named(name, help)).buckets(LATENCY.to_vec());
    HistogramVec::new(opts, labels).expect(VALID)
}
