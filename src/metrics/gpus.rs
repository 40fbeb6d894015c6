//! The machine's GPUs as metrics: NVIDIA's library (NVML) is loaded at run time, and asked when
//! somebody scrapes.
//!
//! A thread of its own asks it: drivers can hang, and a scrape must be answered nevertheless. A
//! machine without the library has no series.

use std::{
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use nvml_wrapper::{Nvml, enum_wrappers::device::TemperatureSensor};
use prometheus::{
    GaugeVec, IntGaugeVec,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tracing::{debug, warn};

use super::{
    LOCK,
    families::{gauges, real_gauges},
};

/// How one GPU is. What it cannot tell is `None`.
#[derive(Clone, Debug, Default)]
struct Gpu {
    /// Its number in the library.
    index: u32,
    /// Share of the last time in which something ran on it, 0..=1.
    utilization: Option<f64>,
    /// Bytes in use, and all.
    memory: Option<(u64, u64)>,
    /// In degrees Celsius.
    temperature: Option<u32>,
    /// In watts.
    power: Option<f64>,
}

#[derive(Clone, Copy)]
struct Limits {
    /// The library is asked at most this often.
    every: Duration,
    /// A scrape waits this long for an answer, and not at all while an earlier question is open.
    wait: Duration,
    /// An answer is shown for this long if no other comes.
    keep: Duration,
}

const LIMITS: Limits = Limits {
    every: Duration::from_secs(1),
    wait: Duration::from_millis(100),
    keep: Duration::from_secs(10),
};

/// All GPUs.
pub(crate) struct Gpus {
    shared: Arc<Shared>,
    ask: mpsc::SyncSender<()>,
    limits: Limits,
    descs: Vec<Desc>,
}

/// What the thread and the scrapes share.
struct Shared {
    state: Mutex<State>,
    answered: Condvar,
}

struct State {
    /// Whether a question has no answer yet. The first is the start itself, which can take long.
    asked: bool,
    answer: Option<(Instant, Vec<Gpu>)>,
}

/// What the registry holds.
#[derive(Clone)]
pub(crate) struct Reader(Arc<Gpus>);

impl Reader {
    /// Looks for NVML, and asks it about the GPUs from now on.
    pub(crate) fn new() -> Reader {
        Reader(Arc::new(Gpus::start(LIMITS, nvml)))
    }
}

/// Opens NVML; gives what asks it. `None` if it is not there.
fn nvml() -> Option<impl FnMut() -> Vec<Gpu>> {
    match Nvml::init() {
        Ok(nvml) => Some(move || all(&nvml)),
        Err(error) => {
            debug!(%error, "NVML is not there: no metrics of GPUs");
            None
        }
    }
}

fn all(nvml: &Nvml) -> Vec<Gpu> {
    let count = nvml.device_count().unwrap_or_else(|error| {
        debug!(%error, "NVML does not say how many GPUs there are");
        0
    });
    (0..count)
        .filter_map(|index| {
            let device = nvml.device_by_index(index).ok()?;
            let memory = device.memory_info().ok();
            Some(Gpu {
                index,
                utilization: device.utilization_rates().ok().map(|it| f64::from(it.gpu) / 100.0),
                memory: memory.map(|it| (it.used, it.total)),
                temperature: device.temperature(TemperatureSensor::Gpu).ok(),
                power: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
            })
        })
        .collect()
}

impl Gpus {
    /// Starts the thread that asks what `open` gives.
    fn start<Ask: FnMut() -> Vec<Gpu>>(
        limits: Limits,
        open: impl FnOnce() -> Option<Ask> + Send + 'static,
    ) -> Gpus {
        let state = Mutex::new(State { asked: true, answer: None });
        let shared = Arc::new(Shared { state, answered: Condvar::new() });
        let (ask, asked) = mpsc::sync_channel(1);
        let answers = shared.clone();
        let run = move || {
            let Some(mut look) = open() else { return };
            loop {
                answers.answer(look());
                if asked.recv().is_err() {
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("gpus".to_owned()).spawn(run) {
            warn!(%error, "no thread to ask NVML: no metrics of GPUs");
        }
        let descs = Families::new().all().iter().flat_map(|it| it.desc()).cloned().collect();
        Gpus { shared, ask, limits, descs }
    }

    /// The GPUs as they were when they were asked last; asks again if that was long ago.
    fn now(&self) -> Vec<Gpu> {
        let mut state = self.shared.state.lock().expect(LOCK);
        let age = |it: &State| it.answer.as_ref().map(|it| it.0.elapsed());
        if !state.asked && age(&state).is_none_or(|it| self.limits.every <= it) {
            // It has room for the one question that is open; if the thread has ended it stays so.
            state.asked = self.ask.try_send(()).is_ok();
            let waited =
                self.shared.answered.wait_timeout_while(state, self.limits.wait, |it| it.asked);
            state = waited.expect(LOCK).0;
        }
        match &state.answer {
            Some((at, gpus)) if at.elapsed() < self.limits.keep => gpus.clone(),
            _ => Vec::new(),
        }
    }
}

impl Shared {
    fn answer(&self, gpus: Vec<Gpu>) {
        let answer = Some((Instant::now(), gpus));
        *self.state.lock().expect(LOCK) = State { asked: false, answer };
        self.answered.notify_all();
    }
}

struct Families {
    utilization: GaugeVec,
    used: IntGaugeVec,
    total: IntGaugeVec,
    temperature: IntGaugeVec,
    power: GaugeVec,
}

impl Families {
    fn new() -> Families {
        let gpu = ["gpu"];
        let busy = "Share of the last time in which a GPU was busy.";
        Families {
            utilization: real_gauges("gpu_utilization_ratio", busy, &gpu),
            used: gauges("gpu_memory_used_bytes", "Memory of a GPU in use, by anybody.", &gpu),
            total: gauges("gpu_memory_total_bytes", "Memory of a GPU.", &gpu),
            temperature: gauges("gpu_temperature_celsius", "How warm a GPU is.", &gpu),
            power: real_gauges("gpu_power_watts", "What a GPU draws.", &gpu),
        }
    }

    fn all(&self) -> [&dyn Collector; 5] {
        [&self.utilization, &self.used, &self.total, &self.temperature, &self.power]
    }

    fn add(&self, gpu: &Gpu) {
        let index = gpu.index.to_string();
        let label = [index.as_str()];
        let int = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        if let Some(ratio) = gpu.utilization {
            self.utilization.with_label_values(&label).set(ratio);
        }
        if let Some((used, total)) = gpu.memory {
            self.used.with_label_values(&label).set(int(used));
            self.total.with_label_values(&label).set(int(total));
        }
        if let Some(celsius) = gpu.temperature {
            self.temperature.with_label_values(&label).set(i64::from(celsius));
        }
        if let Some(watts) = gpu.power {
            self.power.with_label_values(&label).set(watts);
        }
    }
}

impl Collector for Reader {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        self.0.now().iter().for_each(|it| families.add(it));
        families.all().iter().flat_map(|it| it.collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    use prometheus::{Registry, TextEncoder};

    use super::*;

    /// Nobody waits that long: the thread answers at once, on a machine that may be busy.
    const LONG: Duration = Duration::from_secs(30);
    const MS: Duration = Duration::from_millis(1);

    /// Waits for the answer that the start puts.
    fn started(gpus: &Gpus) {
        let state = gpus.shared.state.lock().unwrap();
        let waited = gpus.shared.answered.wait_timeout_while(state, LONG, |it| it.asked).unwrap();
        assert!(!waited.1.timed_out());
    }

    fn text(gpus: Gpus) -> String {
        let registry = Registry::new();
        registry.register(Box::new(Reader(Arc::new(gpus)))).unwrap();
        TextEncoder::new().encode_to_string(&registry.gather()).unwrap()
    }

    #[test]
    fn gpus_are_shown_in_base_units_and_what_they_cannot_tell_is_not() {
        let look = || {
            let memory = Some((2 << 30, 80 << 30));
            let (temperature, power) = (Some(41), Some(118.25));
            let first = Gpu { index: 0, utilization: Some(0.37), memory, temperature, power };
            vec![first, Gpu { index: 1, temperature, ..Gpu::default() }]
        };
        let gpus = Gpus::start(LIMITS, move || Some(look));
        started(&gpus);
        let text = text(gpus);
        let series: Vec<&str> = text.lines().filter(|it| !it.starts_with('#')).collect();
        let expected = [
            "ghostwatch_gpu_memory_total_bytes{gpu=\"0\"} 85899345920",
            "ghostwatch_gpu_memory_used_bytes{gpu=\"0\"} 2147483648",
            "ghostwatch_gpu_power_watts{gpu=\"0\"} 118.25",
            "ghostwatch_gpu_temperature_celsius{gpu=\"0\"} 41",
            "ghostwatch_gpu_temperature_celsius{gpu=\"1\"} 41",
            "ghostwatch_gpu_utilization_ratio{gpu=\"0\"} 0.37",
        ];
        assert_eq!(series, expected);
    }

    #[test]
    fn a_machine_without_the_library_has_no_series_and_does_not_wait() {
        let gpus = Gpus::start(Limits { wait: LONG, ..LIMITS }, || None::<fn() -> Vec<Gpu>>);
        let start = Instant::now();
        assert_eq!(text(gpus), "");
        assert!(start.elapsed() < LONG / 2);
    }

    #[test]
    fn many_scrapes_ask_the_driver_once_and_later_ones_again() {
        let asked = Arc::new(AtomicU64::new(0));
        let limits = |every| Limits { every, wait: LONG, keep: LONG };
        for (every, expected) in [(LONG, 1), (Duration::ZERO, 21)] {
            let (count, before) = (asked.clone(), asked.load(SeqCst));
            let look = move || {
                count.fetch_add(1, SeqCst);
                vec![Gpu::default()]
            };
            let gpus = Gpus::start(limits(every), move || Some(look));
            started(&gpus);
            assert!((0..20).all(|_| gpus.now().len() == 1));
            assert_eq!(asked.load(SeqCst) - before, expected);
        }
    }

    #[test]
    fn a_driver_that_hangs_holds_up_one_scrape_a_little_and_its_last_answer_expires() {
        for (keep, expected) in [(LONG, 1), (Duration::ZERO, 0)] {
            let (_hold, held) = mpsc::channel::<()>();
            let mut first = true;
            let look = move || {
                if !std::mem::take(&mut first) {
                    held.recv().ok();
                }
                vec![Gpu::default()]
            };
            let limits = Limits { every: Duration::ZERO, wait: 50 * MS, keep };
            let gpus = Gpus::start(limits, move || Some(look));
            started(&gpus);
            let start = Instant::now();
            assert!((0..1000).all(|_| gpus.now().len() == expected));
            assert!(50 * MS <= start.elapsed(), "the first waits");
            assert!(start.elapsed() < LONG / 2, "a thousand waits would take 50 s");
        }
    }
}
