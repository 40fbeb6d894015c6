//! The daemon for a long time, with cameras that come and go: nothing grows, nothing is lost.

use std::{
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use crate::{
    end_to_end::{account, configure, drain, events, get, published, start},
    failures::wait_for,
    support::size,
    support_proxy::{Damage, Mode, Proxy},
    support_rtsp::{Media, Server},
};

/// Memory in KiB, threads, descriptors.
pub(crate) fn held(process: u32) -> [u64; 3] {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let number = |name: &str| -> u64 {
        let line = status.lines().find_map(|it| it.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let files = fs::read_dir(format!("/proc/{process}/fd")).unwrap().count() as u64;
    [number("VmRSS:"), number("Threads:"), files]
}

/// The median of each.
fn medians(samples: &[[u64; 3]]) -> [u64; 3] {
    [0, 1, 2].map(|it| {
        let mut all: Vec<_> = samples.iter().map(|sample| sample[it]).collect();
        all.sort_unstable();
        all[all.len() / 2]
    })
}

/// What goes wrong with the cameras, one thing in each cycle.
fn go_wrong(proxy: &Proxy, turn: usize) {
    let damage = Damage { seed: turn as u64, loss: 0.05, reorder: 0.05, ..Damage::default() };
    match turn % 5 {
        0 => {
            proxy.refuse();
            proxy.cut();
        }
        1 => proxy.set(Mode::Silent),
        2 => proxy.set(Mode::Slow(1)),
        3 => proxy.set(Mode::Damage(damage)),
        _ => proxy.finish(),
    }
}

#[test]
fn a_daemon_with_faulty_cameras_does_not_grow() {
    let (length, cycle, cameras) = size((60, 10, 1), (7200, 60, 15));
    // As many streams leave two cores half idle, so that what grows is not a queue.
    let fps = size(10, 2);
    let (length, cycle) = (Duration::from_secs(length), Duration::from_secs(cycle));
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&Media::Pattern { size: (320, 240), fps }, 0, None);
    let proxies: Vec<_> = (0..cameras).map(|_| Proxy::start(server.port())).collect();
    let id = |i: usize| format!("c{i}");
    let mut streams =
        "  pattern: {url: \"test:?size=640x360&fps=10\", realtime: true}\n".to_owned();
    for (i, proxy) in proxies.iter().enumerate() {
        writeln!(streams, "  {}: {{url: \"{}\"}}", id(i), proxy.url()).unwrap();
    }
    let listen = configure(folder.path(), &streams);
    let child = start(folder.path());
    // A cycle begins well; faults come in its second half. Samples are taken before them, as they
    // differ.
    let (begin, mut samples, mut turns) = (Instant::now(), Vec::new(), 0);
    while begin.elapsed() < length {
        let before: Vec<_> = (0..cameras).map(|it| published(&listen, &id(it))).collect();
        wait_for("the cameras are labelled", 60, || {
            (0..cameras).all(|it| before[it] + 10 < published(&listen, &id(it)))
        });
        let half = Instant::now();
        while half.elapsed() < cycle / 2 {
            samples.push(held(child.id()));
            // The rate of the samples, not waiting for something to happen.
            std::thread::sleep(Duration::from_millis(250));
        }
        proxies.iter().enumerate().for_each(|(i, proxy)| go_wrong(proxy, turns + i));
        std::thread::sleep(cycle / 4);
        for proxy in &proxies {
            proxy.set(Mode::Pass);
            proxy.accept();
        }
        turns += 1;
        println!("{turns} cycles, {:?}: {:?}", begin.elapsed(), samples.last());
    }
    // The first third is the warm-up.
    let samples = &samples[samples.len() / 3..];
    let part = samples.len() / 4;
    let (first, last) = (medians(&samples[..part]), medians(&samples[samples.len() - part..]));
    println!(
        "{turns} cycles of faults in {length:?}: memory (KiB), threads, descriptors {first:?}, {last:?}"
    );
    // Three quarters of two thirds of the time lie between the middles of the two parts.
    let hours = length.as_secs_f64() / 3600.0 / 2.0;
    let growth = last[0].saturating_sub(first[0]) as f64 / 1024.0;
    // A minute is all warm-up, as the journal's page cache fills and each new pipeline's threads bring
    // up parts of the heap: 5.7 to 10.0 MiB were measured in it, so the small size only finds what every
    // outage leaks by the MiB. The promise is the long size's.
    let allowed = size(16.0, 1.0 * hours);
    assert!(growth <= allowed, "{growth:.2} MiB in {hours:.2} h; at most {allowed:.2}");
    assert!(last[1] <= first[1] && last[2] <= first[2], "{first:?} became {last:?}");
    let metrics = get(&listen, "/metrics").unwrap();
    assert!(metrics.contains("\nghostwatch_frames_unaccounted 0\n"), "{metrics}");
    drain(child, folder.path());
    let account = account(&events(folder.path()));
    assert!(0 < account["c0"].1 && 0 < account["pattern"].1);
}
