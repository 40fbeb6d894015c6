//! The network alone, as a worker that takes orders on standard input: `benches/bench.py` runs it
//! beside its peers.
//!
//!     network DEVICE WEIGHTS PICTURES
//!
//! PICTURES holds inputs of 224x224, three bytes a pixel, one after the other. Each order is a line
//! and is answered by one: `ok` and figures, or `error` and a reason.
//!
//! - `load BATCH PRECISION LANES`: gets ready, and warm
//! - `answer FILE`: writes the logits of all pictures as float32 to FILE
//! - `run SECONDS`: computes batches on all lanes; answers how many pictures, in how many seconds

use std::{
    env,
    fs::File,
    io::{self, BufRead, Write},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ghostwatch::infer::{
    Model,
    device::GpuStatus,
    load::{Choice, load},
    wanted::Wanted,
};

const SIDE: usize = 224;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).filter(|it| it != "--bench").collect();
    let [device, weights, pictures] = &arguments[..] else {
        bail!("usage: network DEVICE WEIGHTS PICTURES");
    };
    let pictures = std::fs::read(pictures).with_context(|| format!("reading {pictures}"))?;
    let pictures: Vec<&[u8]> = pictures.chunks_exact(SIDE * SIDE * 3).collect();
    let mut worker = Worker { device, weights, pictures, batch: 1, lanes: Vec::new() };
    for line in io::stdin().lock().lines() {
        match worker.obey(&line?) {
            Ok(figures) => println!("ok {figures}"),
            Err(error) => println!("error {}", format!("{error:#}").replace('\n', " ")),
        }
        io::stdout().flush()?;
    }
    Ok(())
}

struct Worker<'a> {
    device: &'a str,
    weights: &'a str,
    pictures: Vec<&'a [u8]>,
    batch: usize,
    lanes: Vec<Box<dyn Model>>,
}

impl Worker<'_> {
    fn obey(&mut self, line: &str) -> anyhow::Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["load", batch, precision, lanes] => {
                self.load(batch.parse()?, precision, lanes.parse()?)
            }
            ["answer", file] => self.answer(file),
            ["run", seconds] => self.run(Duration::from_secs_f64(seconds.parse()?)),
            _ => bail!("unknown order {line:?}"),
        }
    }

    fn load(&mut self, batch: usize, precision: &str, lanes: usize) -> anyhow::Result<String> {
        let choice = Choice {
            weights: self.weights.into(),
            resize: Some(256),
            input: Some(SIDE),
            ..Choice::default()
        };
        let parsed = |it: String| anyhow::anyhow!(it);
        let wanted = Wanted {
            device: self.device.parse().map_err(parsed)?,
            precision: Some(precision.parse().map_err(parsed)?),
            max_batch: batch,
            buckets: Some(vec![batch]),
        };
        self.lanes.clear();
        let loaded = load(&choice, &wanted, &GpuStatus::Absent)?;
        for _ in 1..lanes {
            self.lanes.push(Box::new(loaded.engine.lane()?));
        }
        self.lanes.push(Box::new(loaded.engine));
        self.batch = batch;
        // On threads of their own, as the daemon's lanes are.
        self.run(Duration::ZERO)
    }

    fn answer(&mut self, file: &str) -> anyhow::Result<String> {
        let lane = self.lanes.first_mut().context("nothing is loaded")?;
        let mut out = io::BufWriter::new(File::create(file)?);
        for batch in self.pictures.chunks(self.batch) {
            for value in lane.forward(batch)?.into_iter().flatten() {
                out.write_all(&value.to_le_bytes())?;
            }
        }
        out.flush()?;
        Ok(self.pictures.len().to_string())
    }

    fn run(&mut self, time: Duration) -> anyhow::Result<String> {
        let (batch, pictures) = (self.batch, &self.pictures);
        let together = &Barrier::new(self.lanes.len());
        let started = Instant::now();
        let counts: Vec<anyhow::Result<(usize, Duration)>> = thread::scope(|scope| {
            let lanes: Vec<_> = self
                .lanes
                .iter_mut()
                .map(|lane| {
                    scope.spawn(move || lane_for(lane.as_mut(), pictures, batch, together, time))
                })
                .collect();
            lanes.into_iter().map(|it| it.join().expect("a lane does not panic")).collect()
        });
        let counts = counts.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        let seconds = counts.iter().map(|it| it.1).max().unwrap_or(started.elapsed());
        let pictures: usize = counts.iter().map(|it| it.0).sum();
        Ok(format!("{pictures} {:.6}", seconds.as_secs_f64()))
    }
}

/// One lane's share of a run: how many pictures, and how long it took, from when all were warm.
fn lane_for(
    lane: &mut dyn Model,
    pictures: &[&[u8]],
    batch: usize,
    together: &Barrier,
    time: Duration,
) -> anyhow::Result<(usize, Duration)> {
    let mut batches = pictures.chunks_exact(batch).cycle();
    let mut next = || lane.forward(batches.next().expect("there are pictures")).map(|it| it.len());
    let warm = next().map(|_| ());
    together.wait();
    warm?;
    let (start, mut done) = (Instant::now(), 0);
    while start.elapsed() < time {
        done += next()?;
    }
    Ok((done, start.elapsed()))
}
