//! Which process listens on a port.

use std::{collections::BTreeSet, fs, path::Path};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) pid: String,
    pub(super) name: String,
}

/// The process that listens on this TCP port, on whichever address. `None` also if that may not be
/// seen.
pub(super) fn holder(port: u16) -> Option<Holder> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|it| fs::read_to_string(it).ok());
    let sockets: BTreeSet<String> = tables
        .iter()
        .flatten()
        .flat_map(|it| it.lines())
        .filter_map(|it| inode(it, port))
        .collect();
    let processes = fs::read_dir("/proc").ok()?.filter_map(|it| Some(it.ok()?.path()));
    // Not `self`.
    let is_number = |it: &&str| it.bytes().all(|it| it.is_ascii_digit());
    let is_process =
        |it: &Path| it.file_name().and_then(|it| it.to_str()).filter(is_number).is_some();
    let found = processes.filter(|it| is_process(it)).find(|it| holds(it, &sockets))?;
    let name = fs::read_to_string(found.join("comm")).unwrap_or_default().trim().to_owned();
    Some(Holder { pid: found.file_name()?.to_str()?.to_owned(), name })
}

/// The inode of a line of `/proc/net/tcp`, if it is of a socket that listens on this port.
fn inode(line: &str, port: u16) -> Option<String> {
    const LISTEN: &str = "0A";
    let mut words = line.split_whitespace();
    let (local, state) = (words.nth(1)?, words.nth(1)?);
    let listens = state == LISTEN && local.rsplit_once(':')?.1 == format!("{port:04X}");
    // After them: queues, timer, retransmits, user, timeouts.
    words.nth(5).filter(|_| listens).map(str::to_owned)
}

fn holds(process: &Path, sockets: &BTreeSet<String>) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.filter_map(|it| fs::read_link(it.ok()?.path()).ok()).any(|it| {
        let target = it.to_string_lossy();
        let inode = target.strip_prefix("socket:[").and_then(|it| it.strip_suffix(']'));
        inode.is_some_and(|it| sockets.contains(it))
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_process_that_listens_is_found_and_a_free_port_has_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let pid = std::process::id().to_string();
        assert_eq!(holder(port).map(|it| it.pid), Some(pid));
        drop(listener);
        assert_eq!(holder(port), None);
    }

    #[test]
    fn a_connection_from_the_port_is_no_listener() {
        let line =
            "0: 0100007F:24F8 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 77 1";
        assert_eq!(inode(line, 9464), Some("77".to_owned()));
        assert_eq!(inode(&line.replace(" 0A ", " 01 "), 9464), None);
        assert_eq!(inode(line, 9465), None);
        assert_eq!(inode("sl local_address rem_address st", 9464), None);
    }
}
