//! What is configured, and whether the machine has it: files, their modes, the journal, the port.

use std::{
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::Access;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::{
    cli::{
        advice::advice,
        doctor::{Finding, port},
        find_config,
    },
    config::{
        self, Loaded, Options,
        plan::{JournalPlan, ModelPlan, Plan},
        units::show_size,
    },
    frame::Code,
    infer::weights,
    journal::{bell, read::Reader},
};

/// The configuration and its problems; the plan, as far as there is one.
pub(super) fn configuration(named: Option<&Path>) -> (Vec<Finding>, Option<Plan>) {
    const WHAT: &str = "configuration";
    let path = match find_config(named) {
        Ok(path) => path,
        Err(error) => {
            let todo = "copy config.yaml and change it; `ghostwatch run URL` needs none";
            return (vec![Finding::warn(WHAT, error.to_string(), todo)], None);
        }
    };
    let shown = path.display().to_string();
    let loaded = config::load(&path, &Options::all());
    let mut findings = Vec::new();
    let plan = match loaded {
        Ok(Loaded { plan, warnings }) => {
            let found =
                format!("{shown}: {} streams, {} sinks", plan.streams.len(), plan.sinks.len());
            findings.push(Finding::ok(WHAT, found));
            for it in &warnings.list {
                findings.push(Finding::warn(WHAT, warnings.line(it), "change that line"));
            }
            Some(plan)
        }
        Err(problems) => {
            for it in &problems.list {
                findings.push(Finding::fail(WHAT, problems.line(it), "change that line"));
            }
            // What does not need the world may still be right, and then the rest can be looked at.
            config::load(&path, &Options::alone()).ok().map(|it| it.plan)
        }
    };
    if let Some(it) = fs::metadata(&path).ok().filter(|it| it.mode() & 0o002 != 0) {
        let found = format!("{shown}: everyone may write it (mode {:o})", it.mode() & 0o777);
        findings.push(Finding::fail(WHAT, found, format!("chmod o-w {shown}")));
    }
    findings.extend(config::secret_files(&path).iter().filter_map(|it| secret_file(it)));
    (findings, plan)
}

/// The mode of a file with a secret. One that is not there is a problem of the configuration.
fn secret_file(path: &Path) -> Option<Finding> {
    let meta = fs::metadata(path).ok()?;
    let (shown, mode) = (path.display().to_string(), meta.mode() & 0o777);
    Some(if mode & 0o007 == 0 {
        Finding::ok("secret", format!("{shown}: mode {mode:o}"))
    } else {
        let found = format!("{shown}: everyone on this machine may use it (mode {mode:o})");
        Finding::warn("secret", found, format!("chmod o= {shown}"))
    })
}

/// What the plan needs of the machine.
pub(super) fn plan(plan: &Plan) -> Vec<Finding> {
    let mut findings = model(&plan.model);
    let owner = bell::owner(&plan.journal.path);
    findings.extend(journal(&plan.journal, owner.as_deref()));
    findings.push(listen(plan.http.listen, owner.as_deref()));
    if owner.is_some() {
        findings.extend(streams(plan));
    }
    findings
}

fn model(plan: &ModelPlan) -> Vec<Finding> {
    const WHAT: &str = "model";
    let shown = plan.weights.display();
    let todo = "ghostwatch weights fetch, or set model.weights";
    let size = fs::metadata(&plan.weights).map(|it| it.len());
    let file = match size.map(|it| (it <= weights::FILE_MAX, fs::read(&plan.weights))) {
        Err(error) | Ok((_, Err(error))) => Finding::fail(WHAT, format!("{shown}: {error}"), todo),
        Ok((false, _)) => Finding::fail(WHAT, format!("{shown}: too large for a checkpoint"), todo),
        Ok((true, Ok(bytes))) => {
            let hash: String =
                Sha256::digest(&bytes).iter().take(6).map(|it| format!("{it:02x}")).collect();
            let size = show_size(bytes.len() as u64);
            Finding::ok(
                WHAT,
                format!("{shown}: {size}, sha256:{hash}; the self-test runs at start"),
            )
        }
    };
    vec![file]
}

fn journal(plan: &JournalPlan, owner: Option<&str>) -> Vec<Finding> {
    const WHAT: &str = "journal";
    let (path, shown) = (&plan.path, plan.path.display());
    let size = fs::metadata(path).map(|it| it.len());
    let there = existing(path);
    let mut findings = vec![match &size {
        Ok(size) => Finding::ok(WHAT, format!("{shown}: {}", show_size(*size))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Finding::ok(WHAT, format!("{shown}: not there yet"))
        }
        Err(error) => Finding::fail(WHAT, format!("{shown}: {error}"), "see who owns its folder"),
    }];
    // What SQLite and the lock put beside it needs the folder.
    let folder = if size.is_ok() { path.parent().map(existing) } else { Some(there.clone()) };
    for it in [Some(there.clone()), folder].into_iter().flatten() {
        if let Err(error) = rustix::fs::access(&it, Access::WRITE_OK) {
            let found = format!("{} cannot be written by this user: {error}", it.display());
            let todo = "start as the service's user, or chown it to that user";
            findings.push(Finding::fail(WHAT, found, todo));
            break;
        }
    }
    if let Ok(it) = rustix::fs::statvfs(&there) {
        let free = it.f_bavail * it.f_frsize;
        let keep = plan.retain.keep_free;
        let found = format!("{} free, {} are to stay free", show_size(free), show_size(keep));
        findings.push(if keep <= free {
            Finding::ok("disk", found)
        } else {
            let todo = "make room, or lower journal.retain.keep_free; until then old events go";
            Finding::warn("disk", found, todo)
        });
    }
    findings.push(match owner {
        Some(pid) => Finding::ok("daemon", format!("process {pid} writes this journal")),
        None => Finding::ok("daemon", "none runs with this journal"),
    });
    findings
}

/// The path, or the nearest folder above it that is there.
fn existing(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.ancestors().find(|it| it.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn listen(listen: SocketAddr, owner: Option<&str>) -> Finding {
    const WHAT: &str = "http.listen";
    let error = match TcpListener::bind(listen) {
        Ok(_) => return Finding::ok(WHAT, format!("{listen} is free")),
        Err(error) => error,
    };
    let todo = "set http.listen to another address, or stop what is there";
    if error.kind() != ErrorKind::AddrInUse {
        return Finding::fail(WHAT, format!("{listen}: {error}"), todo);
    }
    match port::holder(listen.port()) {
        Some(it) if Some(&*it.pid) == owner => {
            Finding::ok(WHAT, format!("{listen} is held by the running daemon"))
        }
        Some(it) => {
            let found = format!("{listen} is taken by process {} ({})", it.pid, it.name);
            Finding::fail(WHAT, found, todo)
        }
        // Of another user's process that is not told.
        None if owner.is_some() => {
            Finding::ok(WHAT, format!("{listen} is taken, as it is while a daemon runs"))
        }
        None => Finding::fail(WHAT, format!("{listen} is taken"), todo),
    }
}

/// Streams that the running daemon says are not up.
fn streams(plan: &Plan) -> Vec<Finding> {
    let states = Reader::open(&plan.journal.path).and_then(|it| it.last_states());
    let states = states.unwrap_or_default();
    let events = states.iter().filter_map(|it| serde_json::from_str::<Value>(it).ok());
    let finding = |event: Value| {
        let data = &event["data"];
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        let code = Code::ALL.into_iter().find(|it| it.name() == text("code"))?;
        let is_down = !matches!(&*text("state"), "ended" | "removed" | "disabled");
        let found = format!("{} ({}): {}", text("state"), code.name(), text("detail"));
        let what = format!("stream {}", text("stream"));
        (is_down && plan.streams.contains_key(&text("stream")))
            .then(|| Finding::warn(what, found, advice(code)))
    };
    events.filter_map(finding).collect()
}
