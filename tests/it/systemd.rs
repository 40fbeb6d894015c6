//! The systemd unit is valid and lets the daemon do little: `systemd-analyze` says so.

use std::{fs, path::Path, process::Command};

/// The unit in a folder of its own, as `systemd-analyze` wants it: with a program that exists in
/// place of the installed one, and with the example of that name as its drop-in.
fn unit(drop_in: Option<&str>) -> (tempfile::TempDir, String) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let to = tempfile::tempdir().unwrap();
    let unit = fs::read_to_string(from.join("ghostwatch.service")).unwrap();
    assert!(unit.contains("/usr/bin/ghostwatch"), "the program that is replaced below");
    let path = to.path().join("ghostwatch.service");
    fs::write(&path, unit.replace("/usr/bin/ghostwatch", "/bin/true")).unwrap();
    if let Some(name) = drop_in {
        let folder = to.path().join("ghostwatch.service.d");
        fs::create_dir(&folder).unwrap();
        let example = from.join(format!("ghostwatch.service.d/{name}.conf.example"));
        fs::copy(example, folder.join(format!("{name}.conf"))).unwrap();
    }
    let path = path.to_str().unwrap().to_owned();
    (to, path)
}

fn analyze(arguments: &[&str]) -> String {
    let output = Command::new("systemd-analyze").args(arguments).output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "systemd-analyze {arguments:?}: {words}");
    assert_eq!(words, "", "systemd-analyze {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The overall exposure, from 0 (none) to 10.
fn exposure(unit: &str) -> f64 {
    let table = analyze(&["security", "--offline=true", "--no-pager", unit]);
    let (_, last) =
        table.rsplit_once("Overall exposure level").expect("the last line has the score");
    let (_, score) = last.split_once(": ").expect("a colon stands before the score");
    score.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn the_unit_and_its_drop_ins_are_valid_and_expose_little() {
    // With the drop-ins the service sees devices, which costs.
    for (drop_in, limit) in [(None, 1.3), (Some("gpu"), 1.5), (Some("v4l2"), 1.5)] {
        let (_folder, path) = unit(drop_in);
        analyze(&["verify", "--man=no", &path]);
        let exposure = exposure(&path);
        assert!(exposure <= limit, "{drop_in:?}: {exposure}, at most {limit}");
    }
}

#[test]
fn the_unit_keeps_its_promises_to_the_daemon() {
    let (_folder, path) = unit(None);
    let unit = fs::read_to_string(path).unwrap();
    let has = |line: &str| assert!(unit.lines().any(|it| it == line), "{line}");
    for line in ["Type=notify", "DynamicUser=yes", "StateDirectory=ghostwatch"] {
        has(line);
    }
    // Exit code 1 is a fault of the moment, such as damage to the journal: the next start moves it away.
    has("Restart=on-failure");
    has("RestartPreventExitStatus=2 4");
    has("ExecReload=/bin/kill -HUP $MAINPID");
    for key in ["WatchdogSec=", "ExecStartPre=/bin/true --config ${GHOSTWATCH_CONFIG} check"] {
        assert!(unit.lines().any(|it| it.starts_with(key)), "{key}");
    }
    // Both break the network's speed or the network; see the comments in the unit.
    for line in ["MemoryDenyWriteExecute=yes", "ProcSubset=pid"] {
        assert!(unit.lines().all(|it| it != line), "{line}");
    }
}
