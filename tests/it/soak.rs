//! The daemon for a long time, with a camera that comes and goes: nothing grows, nothing is lost.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::{
    end_to_end::{account, configure, drain, events, get, published, start},
    support::{size, wait_until},
    support_rtsp::{Media, Server},
};

/// Memory in KiB, threads, descriptors.
fn held(process: u32) -> [u64; 3] {
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

#[test]
fn a_daemon_with_a_faulty_camera_does_not_grow() {
    let (length, cycle) = size((60, 10), (1800, 60));
    let (length, cycle) = (Duration::from_secs(length), Duration::from_secs(cycle));
    let folder = tempfile::tempdir().unwrap();
    let media = Media::Pattern { size: (320, 240), fps: 10 };
    let mut camera = Some(Server::start(&media, 0, None));
    let (url, port) = camera.as_ref().map(|it| (it.url(), it.port())).unwrap();
    let streams = format!(
        "  camera: {{url: \"{url}\"}}\n  pattern: {{url: \"test:?size=640x360&fps=10\", realtime: true}}\n"
    );
    let listen = configure(folder.path(), &streams);
    let child = start(folder.path());
    wait_until("both streams", || {
        5 < published(&listen, "camera") && 5 < published(&listen, "pattern")
    });
    // Half a cycle with the camera, half without: samples are taken with it, as outages differ.
    let (begin, mut samples, mut turns) = (Instant::now(), Vec::new(), 0);
    while begin.elapsed() < length {
        let before = published(&listen, "camera");
        wait_until("the camera is labelled again", || before + 10 < published(&listen, "camera"));
        let half = Instant::now();
        while half.elapsed() < cycle / 2 {
            samples.push(held(child.id()));
            // The rate of the samples, not waiting for something to happen.
            std::thread::sleep(Duration::from_millis(250));
        }
        drop(camera.take());
        std::thread::sleep(cycle / 4);
        camera = Some(Server::start(&media, port, None));
        turns += 1;
    }
    // The first third is the warm-up.
    let samples = &samples[samples.len() / 3..];
    let part = samples.len() / 4;
    let (first, last) = (medians(&samples[..part]), medians(&samples[samples.len() - part..]));
    println!(
        "{turns} outages in {length:?}: memory (KiB), threads, descriptors {first:?}, {last:?}"
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
    assert!(0 < account["camera"].1 && 0 < account["pattern"].1);
}
