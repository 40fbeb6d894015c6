//! What is there without a configuration: versions, plugins, a GPU, limits, the clock, systemd.

use std::{env, fs, path::Path, process::Command};

#[cfg(feature = "native")]
use crate::infer::native::Isa;
use crate::{
    cli::doctor::{Finding, Level},
    config::plan::Plan,
    infer::{
        gpu::{self, Found},
        wanted::Use,
    },
    observe::TORCH,
    source::gst::{self, decoders, inventory},
};

/// Descriptors that a daemon may need with a few streams, sinks and clients; systemd and most
/// shells give 1024 or more.
const FILES_MIN: u64 = 1024;

/// What runs.
pub(super) fn versions() -> Vec<Finding> {
    let revision = option_env!("GHOSTWATCH_REVISION").unwrap_or("unknown");
    let kafka = if cfg!(feature = "kafka") { "with" } else { "without" };
    let target = format!("{}-{}", env::consts::ARCH, env::consts::OS);
    let version = env!("CARGO_PKG_VERSION");
    let mut findings = vec![Finding::ok(
        "ghostwatch",
        format!("{version}, revision {revision}, for {target}, {kafka} Kafka"),
    )];
    findings.extend(engines());
    findings
}

/// What can compute the network.
fn engines() -> [Finding; 2] {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library = maps.lines().find_map(|it| {
        let path = it.split_whitespace().nth(5)?;
        path.contains("/libtorch_cpu").then(|| path.to_owned())
    });
    let torch = match (Use::Cpu.lacks(), library) {
        (Some(_), _) => "not in this build: no GPU, and on the CPU our own engine".to_owned(),
        (None, Some(path)) => format!("{TORCH}, {path}"),
        (None, None) => format!("{TORCH}, linked in"),
    };
    #[cfg(feature = "native")]
    let own = match Isa::best() {
        Isa::Portable => "this processor has no AVX2, it will be slow".to_owned(),
        isa => format!("with {}", format!("{isa:?}").to_uppercase()),
    };
    #[cfg(not(feature = "native"))]
    let own = "not in this build";
    [Finding::ok("libtorch", torch), Finding::ok("our own engine", own)]
}

/// GStreamer, its elements and decoders.
pub(super) fn gstreamer() -> Vec<Finding> {
    let inventory = match inventory::inventory() {
        Ok(it) => it,
        Err(error) => {
            let todo = "run scripts/setup, or install the packages that it names";
            return vec![Finding::fail("GStreamer", error.to_string(), todo)];
        }
    };
    let mut findings = vec![Finding::ok("GStreamer", gst::version())];
    for it in &inventory.packages {
        let what = format!("plugins of {}", it.name);
        findings.push(if it.missing.is_empty() {
            Finding::ok(what, format!("{} elements for {}", it.present.len(), it.needed_for))
        } else {
            let found = format!("missing for {}: {}", it.needed_for, it.missing.join(", "));
            Finding::fail(what, found, format!("apt-get install {}", it.name))
        });
    }
    findings.push(match inventory.tls {
        true => Finding::ok("TLS of cameras", "GLib has it"),
        false => {
            let found = "GLib has none, so rtsps: and https: do not work";
            Finding::warn("TLS of cameras", found, "apt-get install glib-networking")
        }
    });
    findings.extend(inventory.decoders.iter().map(|(codec, found)| decoder(codec, found)));
    findings
}

fn decoder(codec: &str, found: &[decoders::Found]) -> Finding {
    let what = format!("decoder of {codec}");
    let all: Vec<_> = found
        .iter()
        .map(|it| {
            let kind = if it.hardware { "hardware, not used" } else { "software" };
            format!("{} ({kind}, rank {})", it.name, it.rank)
        })
        .collect();
    match found.first() {
        Some(it) if !it.hardware => Finding::ok(what, all.join(", ")),
        Some(_) => Finding::warn(
            what,
            format!("none in software: {}", all.join(", ")),
            "apt-get install gstreamer1.0-libav",
        ),
        None => Finding::warn(what, "none", "apt-get install gstreamer1.0-libav"),
    }
}

/// The GPU, as far as that can be told without loading anything.
pub(super) fn gpu(plan: Option<&Plan>) -> Finding {
    let wanted = plan.map_or(Use::Auto, |it| it.device.device);
    let configured = plan.and_then(|it| it.device.cuda.as_deref());
    let found = gpu::find(Path::new("/"), &gpu::places(configured));
    let needed = matches!(wanted, Use::Cuda(_));
    match (found, wanted) {
        (_, Use::Cpu | Use::Native) => {
            Finding::ok("GPU", format!("not wanted (device.use: {wanted})"))
        }
        (Found::Set(_) | Found::Unusable(_), Use::Auto) if Use::Cuda(0).lacks().is_some() => {
            Finding::ok("GPU", "there, but not used: this build has no libtorch")
        }
        (Found::Set(set), _) => Finding::ok(
            "GPU",
            format!("there, with CUDA libraries in {}; not loaded here", set.display()),
        ),
        (Found::Nothing, _) if needed => Finding::fail(
            "GPU",
            "none, but device.use names one",
            "set device.use to auto, or give the machine a GPU",
        ),
        (Found::Nothing, _) => Finding::ok("GPU", "none; the CPU does the work"),
        (Found::Unusable(reason), _) => Finding {
            level: if needed { Level::Fail } else { Level::Warn },
            ..Finding::warn(
                "GPU",
                reason,
                "or set device.use to native: the CPU does the work meanwhile",
            )
        },
    }
}

/// Limits, clock and service manager.
pub(super) fn system() -> Vec<Finding> {
    let mut findings = vec![files(), clock()];
    findings.push(if Path::new("/run/systemd/system").exists() {
        let properties = "LoadState,ActiveState,MainPID,FragmentPath,NeedDaemonReload";
        match ask("systemctl", &["show", "ghostwatch.service", "-p", properties]) {
            Some(said) => unit(&said),
            None => Finding::ok("systemd unit", "systemctl does not answer"),
        }
    } else {
        Finding::ok("systemd unit", "systemd does not run here")
    });
    findings
}

fn files() -> Finding {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|it| it.strip_prefix("Max open files"));
    let soft = line.and_then(|it| it.split_whitespace().next()).unwrap_or("unknown").to_owned();
    match soft.parse::<u64>() {
        Ok(few) if few < FILES_MIN => Finding::warn(
            "open files",
            format!("at most {few}"),
            format!("ulimit -n {FILES_MIN}, or LimitNOFILE= in the unit"),
        ),
        _ => Finding::ok("open files", format!("at most {soft}")),
    }
}

fn clock() -> Finding {
    const WHAT: &str = "clock";
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return Finding::ok(WHAT, "synchronised (systemd-timesyncd)");
    }
    match ask("timedatectl", &["show", "-p", "NTPSynchronized", "--value"]).as_deref() {
        Some("yes") => Finding::ok(WHAT, "synchronised"),
        Some("no") => Finding::warn(
            WHAT,
            "not synchronised: times of events are as wrong as it is",
            "switch NTP on: timedatectl set-ntp true, or chrony",
        ),
        _ => Finding::warn(
            WHAT,
            "nothing here says whether it is synchronised",
            "compare it with a clock that is; in a container the host's counts",
        ),
    }
}

/// What `systemctl show` says of the unit.
fn unit(said: &str) -> Finding {
    const WHAT: &str = "systemd unit";
    let property = |name: &str| {
        let value = said.lines().find_map(|it| it.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_default()
    };
    let (path, active) = (property("FragmentPath"), property("ActiveState"));
    if property("LoadState") != "loaded" {
        return Finding::ok(WHAT, "not installed");
    }
    if property("NeedDaemonReload") == "yes" {
        let found = format!("{path} was changed and not read again");
        return Finding::warn(WHAT, found, "systemctl daemon-reload");
    }
    match active {
        "failed" => {
            Finding::fail(WHAT, format!("{path}: failed"), "journalctl -u ghostwatch -n 50")
        }
        "active" => Finding::ok(WHAT, format!("{path}: active, process {}", property("MainPID"))),
        other => Finding::ok(WHAT, format!("{path}: {other}")),
    }
}

/// What a program answers, without our environment: it can hold secrets.
fn ask(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("LC_ALL", "C");
    if let Some(path) = env::var_os("PATH") {
        command.env("PATH", path);
    }
    let output = command.output().ok().filter(|it| it.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_that_failed_or_was_not_read_again_is_told() {
        let said = |active: &str, reload: &str| {
            let text = format!(
                "LoadState=loaded\nActiveState={active}\nMainPID=7\nFragmentPath=/u\n\
                 NeedDaemonReload={reload}\n"
            );
            let it = unit(&text);
            (it.level, it.found)
        };
        assert_eq!(said("active", "no"), (Level::Ok, "/u: active, process 7".to_owned()));
        assert_eq!(said("failed", "no"), (Level::Fail, "/u: failed".to_owned()));
        assert_eq!(said("active", "yes").0, Level::Warn);
        assert_eq!(unit("LoadState=not-found\n").found, "not installed");
    }

    #[test]
    fn a_codec_without_a_software_decoder_is_told_with_the_package() {
        let found =
            |name: &str, hardware| decoders::Found { name: name.into(), rank: 256, hardware };
        let it = decoder("H.264", &[found("avdec_h264", false), found("vah264dec", true)]);
        assert_eq!(it.level, Level::Ok);
        let expected = "avdec_h264 (software, rank 256), vah264dec (hardware, not used, rank 256)";
        assert_eq!(it.found, expected);
        let it = decoder("H.264", &[found("vah264dec", true)]);
        assert_eq!((it.level, &*it.todo), (Level::Warn, "apt-get install gstreamer1.0-libav"));
        assert_eq!(decoder("H.264", &[]).level, Level::Warn);
    }
}
