//! The sinks as metrics: their progress is read when somebody scrapes.

use std::{
    sync::{Arc, Mutex, RwLock, atomic::Ordering::Relaxed},
    time::Duration,
};

use prometheus::{
    GaugeVec, HistogramVec, IntCounterVec, IntGaugeVec, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::{
    LOCK,
    families::{counters, gauges, histograms, real_gauges, register},
};
use crate::sink::{broker::Code, progress::Progress};

/// All sinks.
pub(crate) struct Sinks {
    all: RwLock<Vec<Arc<Progress>>>,
    /// The sequence number that the journal's next event gets.
    next: Mutex<u64>,
    ack: HistogramVec,
    delivery: HistogramVec,
    descs: Vec<Desc>,
}

/// What the registry holds.
#[derive(Clone)]
struct Reader(Arc<Sinks>);

struct Families {
    up: IntGaugeVec,
    lag: IntGaugeVec,
    at_risk: IntGaugeVec,
    oldest: GaugeVec,
    sent: IntCounterVec,
    acked: IntCounterVec,
    retries: IntCounterVec,
    duplicates: IntCounterVec,
    dead: IntCounterVec,
    lost: IntCounterVec,
    errors: IntCounterVec,
}

impl Families {
    fn new() -> Families {
        let one = ["sink"];
        Families {
            up: gauges("sink_up", "Whether a sink is connected.", &one),
            lag: gauges("sink_lag_events", "Events in the journal after a sink's cursor.", &one),
            at_risk: gauges(
                "sink_at_risk",
                "Whether retention will soon remove events that a sink has not delivered.",
                &one,
            ),
            oldest: real_gauges(
                "sink_oldest_unacked_seconds",
                "How long the oldest event that a sink is delivering has been in the journal.",
                &one,
            ),
            sent: counters("sink_sent_total", "Messages handed to a broker's client.", &one),
            acked: counters("sink_acked_total", "Messages acknowledged.", &one),
            retries: counters("sink_retries_total", "Deliveries begun again.", &one),
            duplicates: counters(
                "sink_duplicates_total",
                "Messages that the broker said it had already.",
                &one,
            ),
            dead: counters(
                "sink_dead_letters_total",
                "Messages that the broker will never take, written to the dead-letter file.",
                &one,
            ),
            lost: counters(
                "sink_lost_events_total",
                "Events that were gone from the journal before a sink had them.",
                &one,
            ),
            errors: counters("sink_errors_total", "Failures of a sink.", &["sink", "code"]),
        }
    }

    fn all(&self) -> [&dyn Collector; 11] {
        [
            &self.up,
            &self.lag,
            &self.at_risk,
            &self.oldest,
            &self.sent,
            &self.acked,
            &self.retries,
            &self.duplicates,
            &self.dead,
            &self.lost,
            &self.errors,
        ]
    }

    fn add(&self, it: &Progress, next: u64) {
        let sink = [it.cursor.sink()];
        let lag = next.saturating_sub(it.cursor.get() + 1);
        self.up.with_label_values(&sink).set(it.up.load(Relaxed).into());
        self.lag.with_label_values(&sink).set(i64::try_from(lag).unwrap_or(i64::MAX));
        self.at_risk.with_label_values(&sink).set(it.cursor.is_at_risk().into());
        self.oldest.with_label_values(&sink).set(it.oldest_unacked().as_secs_f64());
        for (family, count) in [
            (&self.sent, &it.sent),
            (&self.acked, &it.acked),
            (&self.retries, &it.retries),
            (&self.duplicates, &it.duplicates),
            (&self.dead, &it.dead),
            (&self.lost, &it.lost),
        ] {
            family.with_label_values(&sink).inc_by(count.load(Relaxed));
        }
        for code in Code::ALL {
            let labels = [sink[0], code.name()];
            self.errors.with_label_values(&labels).inc_by(it.errors(code));
        }
    }
}

impl Sinks {
    pub(crate) fn registered(registry: &Registry) -> Arc<Sinks> {
        let ack = histograms(
            "sink_ack_duration_seconds",
            "From handing a message to a broker's client to its acknowledgement.",
            &["sink"],
        );
        let delivery = histograms(
            "delivery_seconds",
            "From a frame's arrival to a broker's acknowledgement, by the wall clock.",
            &["sink"],
        );
        let descs = Families::new().all().iter().flat_map(|it| it.desc()).cloned().collect();
        let it = Arc::new(Sinks {
            all: RwLock::default(),
            next: Mutex::new(1),
            ack: register(registry, ack),
            delivery: register(registry, delivery),
            descs,
        });
        register(registry, Reader(it.clone()));
        it
    }

    /// A broker has acknowledged a message.
    pub(crate) fn acked(&self, sink: &str, took: Duration, since_arrival: Option<Duration>) {
        self.ack.with_label_values(&[sink]).observe(took.as_secs_f64());
        if let Some(it) = since_arrival {
            self.delivery.with_label_values(&[sink]).observe(it.as_secs_f64());
        }
    }

    pub(crate) fn add(&self, progress: Arc<Progress>) {
        self.all.write().expect(LOCK).push(progress);
    }

    /// Called once the sink has ended, or a last acknowledgement would bring its series back.
    pub(crate) fn remove(&self, name: &str) {
        self.all.write().expect(LOCK).retain(|it| it.cursor.sink() != name);
        // An error only says that there is no such series.
        drop(self.ack.remove_label_values(&[name]));
        drop(self.delivery.remove_label_values(&[name]));
    }

    /// The journal has grown.
    pub(crate) fn next(&self, next: u64) {
        *self.next.lock().expect(LOCK) = next;
    }
}

impl Collector for Reader {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        let next = *self.0.next.lock().expect(LOCK);
        for it in self.0.all.read().expect(LOCK).iter() {
            families.add(it, next);
        }
        families.all().iter().flat_map(|it| it.collect()).collect()
    }
}
