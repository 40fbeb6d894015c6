//! A subscriber that is not ours: `mosquitto_sub` with a session that outlives connections.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::{support::wait_until, support_broker::Server};

/// Everything that is published, as lines `RETAINED TOPIC PAYLOAD`.
pub(crate) struct Reader {
    child: Child,
    file: PathBuf,
}

impl Reader {
    pub(crate) fn start(server: &Server, folder: &Path) -> Reader {
        Reader::named("reader", server, folder)
    }

    /// Returns when the broker has taken the subscription.
    pub(crate) fn named(name: &str, server: &Server, folder: &Path) -> Reader {
        let file = folder.join(format!("{name}.out"));
        let port = server.port.to_string();
        let child = Command::new("stdbuf")
            .args(["-oL", "mosquitto_sub", "-h", "127.0.0.1", "-p", &port, "-i", name, "-c"])
            .args(["-q", "1", "-t", "ghostwatch/#", "-F", "%r %t %p"])
            .stdin(Stdio::null())
            .stdout(File::create(&file).unwrap())
            .spawn()
            .expect("mosquitto_sub starts; scripts/setup test installs it");
        let subscribed = format!("Sending SUBACK to {name}");
        wait_until("it is subscribed", || server.printed().contains(&subscribed));
        Reader { child, file }
    }

    /// The complete lines so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.file).unwrap();
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete.lines().map(str::to_owned).collect()
    }

    /// How many lines there are, fast.
    pub(crate) fn count(&self) -> usize {
        fs::read(&self.file).unwrap().iter().filter(|it| **it == b'\n').count()
    }

    /// Topic, id and payload of each event.
    pub(crate) fn events(&self) -> Vec<(String, String, String)> {
        let event = |line: &String| {
            let mut parts = line.splitn(3, ' ').skip(1).map(str::to_owned);
            let topic = parts.next().unwrap();
            let payload = parts.next().unwrap();
            if topic.ends_with("/label") || topic.ends_with("/available") {
                return None;
            }
            let id = payload.split(r#""id":""#).nth(1).unwrap().split('"').next().unwrap();
            Some((topic, id.to_owned(), payload))
        };
        self.lines().iter().filter_map(event).collect()
    }

    /// What was said about us, in order.
    pub(crate) fn words(&self) -> Vec<String> {
        let word = |it: &String| it.split_once("ghostwatch/available ").map(|it| it.1.to_owned());
        self.lines().iter().filter_map(word).collect()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
