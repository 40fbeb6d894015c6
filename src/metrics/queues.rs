//! The queues as metrics: looked at when somebody scrapes.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
    time::Duration,
};

use prometheus::{
    GaugeVec, IntGaugeVec,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::{
    LOCK,
    families::{gauges, real_gauges},
};

/// How a queue is now.
#[derive(Clone, Copy, Debug)]
pub struct QueueNow {
    /// Items waiting.
    pub length: u64,
    /// How long the first of them has waited; 0 if there is none.
    pub oldest_age: Duration,
}

struct Queue {
    capacity: usize,
    look: Box<dyn Fn() -> QueueNow + Send + Sync>,
}

/// All queues.
pub(crate) struct Queues {
    by_name: RwLock<BTreeMap<String, Queue>>,
    descs: Vec<Desc>,
}

/// What the registry holds.
#[derive(Clone)]
pub(crate) struct Reader(pub(crate) Arc<Queues>);

struct Families {
    length: IntGaugeVec,
    capacity: IntGaugeVec,
    oldest_age: GaugeVec,
}

impl Families {
    fn new() -> Families {
        let labels = ["queue"];
        Families {
            length: gauges("queue_length", "Items waiting in a queue.", &labels),
            capacity: gauges("queue_capacity", "Items that a queue can hold.", &labels),
            oldest_age: real_gauges(
                "queue_oldest_age_seconds",
                "How long the first item of a queue has waited; 0 if none waits.",
                &labels,
            ),
        }
    }

    fn all(&self) -> [&dyn Collector; 3] {
        [&self.length, &self.capacity, &self.oldest_age]
    }
}

impl Queues {
    pub(crate) fn new() -> Queues {
        let descs = Families::new().all().iter().flat_map(|it| it.desc()).cloned().collect();
        Queues { by_name: RwLock::default(), descs }
    }

    pub(crate) fn add(
        &self,
        name: &str,
        capacity: usize,
        look: Box<dyn Fn() -> QueueNow + Send + Sync>,
    ) {
        self.by_name.write().expect(LOCK).insert(name.to_owned(), Queue { capacity, look });
    }

    pub(crate) fn remove(&self, name: &str) {
        self.by_name.write().expect(LOCK).remove(name);
    }
}

impl Collector for Reader {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        for (name, queue) in self.0.by_name.read().expect(LOCK).iter() {
            let now = (queue.look)();
            let label = [name.as_str()];
            families.length.with_label_values(&label).set(now.length as i64);
            families.capacity.with_label_values(&label).set(queue.capacity as i64);
            families.oldest_age.with_label_values(&label).set(now.oldest_age.as_secs_f64());
        }
        families.all().iter().flat_map(|it| it.collect()).collect()
    }
}
