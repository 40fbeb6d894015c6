//! `events replay`: sends a range of events to a sink again.

use std::{
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use signal_hook::{consts, flag};

use crate::{
    cli::{
        Exit, code,
        events::{bar, number},
        find_config,
    },
    config::{self, plan::SinkPlan, units},
    journal::{bell, cursor::Cursor, read::Reader},
    log,
    sink::{Sink, Sinks, deliver::Watch, progress::Progress, settings::Target},
};

/// How often the sink is looked at.
const TICK: Duration = Duration::from_millis(50);
/// A sink that is told to stop has this long to deliver what is in its hands.
const STOP: Duration = Duration::from_secs(8);

/// Send a range of events to a sink again, with the same ids.
///
/// Consumers know events by their id, so those that they have already are duplicates to them. Some
/// brokers notice that themselves: NATS JetStream drops what repeats within the stream's duplicate
/// window (two minutes, unless the stream is configured otherwise) and stores again what is older;
/// Redis refuses ids at or below the newest one of a key. Both count as acknowledged duplicates.
/// MQTT, Kafka and webhooks pass everything on once more.
///
/// The running daemon's own place in that sink does not move. A sink for MQTT or a file can be
/// replayed to only while no daemon writes to the journal: they would be in each other's way. What
/// the broker does not take goes to a dead-letter file beside the journal, of the sink's name with
/// `-replay`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The first event.
    #[arg(long, value_name = "SEQ", value_parser = number)]
    from: u64,
    /// The last event [default: the last one that is there now].
    #[arg(long, value_name = "SEQ", value_parser = number)]
    to: Option<u64>,
    /// The sink, by its name in the configuration.
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// Give up when nothing has been acknowledged for so long.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    patience: Duration,
}

fn duration(text: &str) -> Result<Duration, String> {
    units::duration(text).ok_or_else(|| "expected a duration such as 60s".to_owned())
}

/// Nobody measures a replay.
struct Unwatched;

impl Watch for Unwatched {
    fn acked(&self, _sink: &str, _took: Duration, _since_arrival: Option<Duration>) {}
}

/// Sends the events and says what became of them.
///
/// # Errors
/// There is no such sink (exit code 2), or not everything was delivered (1).
pub fn run(args: &Args, journal: Option<&Path>, config: Option<&Path>) -> anyhow::Result<()> {
    // The model is not needed, the passwords are.
    let options = config::Options { files: false, ..config::Options::all() };
    let loaded = config::load(&find_config(config)?, &options);
    let plan = loaded.map_err(|it| Exit::wrong(it.to_string()))?.plan;
    let journal = journal.unwrap_or(&plan.journal.path);
    let names: Vec<_> = plan.sinks.iter().map(|it| it.name.as_str()).collect();
    let sink = plan.sinks.iter().find(|it| it.name == args.sink).ok_or_else(|| {
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Exit::wrong(format!("--sink {}: no such sink; configured: {known}", args.sink))
    })?;
    let target = apart(sink, journal)?;
    let latest = Reader::open(journal)?.latest()?;
    let last = args.to.unwrap_or(latest).min(latest);
    if last < args.from {
        let from = args.from;
        return Err(Exit::wrong(format!("nothing to send: --from {from} is after {last}")));
    }
    let _log = log::init(plan.log.level, log::Format::Text)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [consts::SIGTERM, consts::SIGINT] {
        // The order matters: the first signal only sets the flag, the second finds it set.
        flag::register_conditional_shutdown(signal, code::SIGNAL, stop.clone())?;
        flag::register(signal, stop.clone())?;
    }
    // Not the writer's, so it is saved nowhere.
    let cursor = Cursor::new(&format!("{}-replay", sink.name), args.from.saturating_sub(1));
    let progress = Progress::new(Arc::new(cursor));
    let sinks = vec![Sink { target, select: sink.select.clone(), progress: progress.clone() }];
    let watch: Arc<dyn Watch> = Arc::new(Unwatched);
    let sinks = Sinks::start_until(sinks, last, (journal, &plan.instance), &watch)?;
    let ended = wait(args, sinks, (last, &progress), &stop);
    report(args, last, &progress)?;
    ended?;
    Ok(())
}

/// The sink's target, so that replaying is not in the way of a daemon that runs.
fn apart(sink: &SinkPlan, journal: &Path) -> anyhow::Result<Target> {
    let target = match sink.target.clone() {
        Target::Mqtt(mut it) => {
            // The last label of a stream is the newest one's, not the one that is sent again.
            it.retain_label = false;
            Target::Mqtt(it)
        }
        Target::Kafka(mut it) => {
            it.client_id.push_str("-replay");
            Target::Kafka(it)
        }
        other => other,
    };
    let alone = matches!(target, Target::Mqtt(_) | Target::File(..));
    if let Some(pid) = bell::owner(journal).filter(|_| alone) {
        return Err(Exit::wrong(format!(
            "sink {} belongs to process {pid}, which writes to the journal; stop it to replay to an \
             MQTT or file sink",
            sink.name
        )));
    }
    Ok(target)
}

/// Waits for the end, a signal, or the end of the patience.
fn wait(
    args: &Args,
    sinks: Sinks,
    (last, progress): (u64, &Progress),
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let bar = bar("replaying");
    bar.set_length(last + 1 - args.from);
    let (mut at, mut moved) = (progress.cursor.get(), Instant::now());
    while !sinks.is_done() && !stop.load(Relaxed) && moved.elapsed() < args.patience {
        thread::sleep(TICK);
        if at < progress.cursor.get() {
            (at, moved) = (progress.cursor.get(), Instant::now());
            bar.set_position((at + 1).saturating_sub(args.from));
        }
    }
    bar.finish_and_clear();
    let done = sinks.is_done();
    let ended = sinks.stop(Instant::now() + STOP);
    if progress.cursor.get() < last {
        ended?;
        let why = match (stop.load(Relaxed), done) {
            (true, _) => "stopped by a signal".to_owned(),
            (_, true) => "the sink ended early".to_owned(),
            _ => format!("nothing was acknowledged for {}", units::show_duration(args.patience)),
        };
        let from = progress.cursor.get() + 1;
        return Err(Exit::failed(format!("{why}; go on with --from {from}")));
    }
    ended.context("all was delivered, but")
}

/// One line on what became of the events.
fn report(args: &Args, last: u64, progress: &Progress) -> io::Result<()> {
    let count = |it: &std::sync::atomic::AtomicU64| it.load(Relaxed);
    writeln!(
        io::stdout(),
        "events {} to {last} to sink {}: {} acknowledged, {} of them duplicates; {} dead letters; {} gone from the journal",
        args.from,
        args.sink,
        count(&progress.acked),
        count(&progress.duplicates),
        count(&progress.dead),
        count(&progress.lost)
    )
}
