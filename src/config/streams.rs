//! Typed values -> the streams of the plan: ids, URLs, credentials.

use std::{collections::BTreeMap, path::PathBuf};

use crate::{
    config::{
        build::{Builder, DEFAULT, ID, Place, is_id},
        node::Key,
        plan::{StreamPlan, TlsPlan},
        problem::{Problem, escaped},
        read::Fields,
        read_secret,
    },
    edge::WhenFull,
    health::Settings,
    secret::Secret,
    source::{
        Decode,
        fingerprint::Fingerprint,
        url::{Parsed, SourceUrl, Transport},
    },
};

impl Builder<'_> {
    /// The streams, as far as their URLs are usable.
    pub fn streams(&mut self, root: &Fields, most: usize) -> BTreeMap<String, StreamPlan> {
        let entries = root.entries("streams");
        if most < entries.len() {
            let problem = root.problem("streams", format!("there are {} streams", entries.len()));
            self.problems.push(problem.allowed(format!("at most {most} (limits.max_streams)")));
        }
        let mut streams = BTreeMap::new();
        for (key, fields) in entries {
            self.id(key, &fields.path);
            if let Some(stream) = self.stream(fields, root.map("defaults")) {
                streams.insert(key.name.clone(), stream);
            }
        }
        streams
    }

    fn id(&mut self, key: &Key, path: &str) {
        if !is_id(&key.name) {
            let problem = Problem::new(key.mark, path, "the id is not valid");
            self.problems.push(problem.allowed(ID));
        }
    }

    /// `None` iff there is no usable URL, which then is already a problem.
    fn stream(&mut self, it: &Fields, defaults: &Fields) -> Option<StreamPlan> {
        let text = it.text("url")?;
        let Parsed { url, username, password } = match SourceUrl::parse(text) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.problems.push(it.problem("url", escaped(&error.to_string())));
                return None;
            }
        };
        let inline = password.is_some() && it.is_inline("url");
        self.belongs(it, &url);
        self.warn_inline(it, inline);
        let (username, password) = self.credentials(it, username, password);
        let from = |name| if it.has(name) { it } else { defaults };
        let when_full = match from("when_full").word("when_full").expect(DEFAULT) {
            "latest" => WhenFull::Latest,
            "block" => WhenFull::Block,
            _ if url.is_live() => WhenFull::Latest,
            _ => WhenFull::Block,
        };
        let tls = self.tls(it.map("tls"), &url);
        let health = health(it.map("health"), defaults.map("health"), &url);
        Some(StreamPlan {
            url: Secret::new(self.location(it, &url, text)),
            username,
            password,
            max_fps: from("max_fps").number("max_fps"),
            transport: match from("transport").word("transport").expect(DEFAULT) {
                "udp" => Transport::Udp,
                "auto" => Transport::Auto,
                _ => Transport::Tcp,
            },
            latency: from("latency").duration("latency").expect(DEFAULT),
            stall_after: from("stall_after").duration("stall_after").expect(DEFAULT),
            max_clock_offset: from("max_clock_offset").duration("max_clock_offset").expect(DEFAULT),
            when_full,
            decode: match from("decode").word("decode").expect(DEFAULT) {
                "auto" => Decode::Auto,
                "va" => Decode::Va,
                "nv" => Decode::Nv,
                _ => Decode::Software,
            },
            looped: it.bool("loop").expect(DEFAULT),
            realtime: it.bool("realtime").expect(DEFAULT),
            start_time: it.time("start_time"),
            weight: it.int("weight").map(|it| it as u32).expect(DEFAULT),
            health,
            tls,
        })
    }

    fn tls(&mut self, it: &Fields, url: &SourceUrl) -> TlsPlan {
        const NAME: &str = "fingerprint";
        let verify = it.bool("verify").expect(DEFAULT);
        let ca_file = self.path(it, "ca_file", true);
        let fingerprint = it.text(NAME).and_then(|text| match Fingerprint::parse(text) {
            Some(fingerprint) => Some(fingerprint),
            None => {
                let problem = it.problem(NAME, "this is no fingerprint");
                self.problems.push(problem.allowed("`sha256:` and 64 hex digits"));
                None
            }
        });
        if fingerprint.is_some() {
            let problem = match url {
                SourceUrl::Rtsp(remote) if remote.tls => match (verify, &ca_file) {
                    (true, None) => None,
                    (false, _) => Some("there is `verify: false` too, which accepts every other"),
                    (true, Some(_)) => Some("there is `ca_file` too; one of them decides"),
                },
                SourceUrl::Http(remote) if remote.tls => Some(
                    "only an rtsps stream can have this; for https put the certificate itself \
                     into a `ca_file`",
                ),
                _ => Some("only an rtsps stream can have this"),
            };
            self.problems.extend(problem.map(|message| it.problem(NAME, message)));
        }
        TlsPlan { verify, ca_file, fingerprint }
    }

    /// Refuses fields that mean nothing for this kind of source.
    fn belongs(&mut self, it: &Fields, url: &SourceUrl) {
        let mut refuse = |name: &str, whose: &str| {
            self.problems.push(it.problem(name, format!("only {whose} can have this")));
        };
        if url.is_live() {
            for name in ["loop", "realtime"] {
                if it.bool(name) == Some(true) {
                    refuse(name, "a file or test pattern");
                }
            }
        }
        if !matches!(url, SourceUrl::File(_)) && it.time("start_time").is_some() {
            refuse("start_time", "a file");
        }
        if !url.is_live() {
            for name in ["username", "password", "password_file", "password_credential"] {
                if it.has(name) {
                    refuse(name, "an rtsp, rtsps, http or https stream");
                }
            }
        }
    }

    pub(super) fn warn_inline(&mut self, it: &Fields, in_url: bool) {
        let name = if in_url {
            "url"
        } else if it.is_inline("password") {
            "password"
        } else {
            return;
        };
        let message = match self.around.place {
            Place::PrivateFile => {
                "a password is written in this file; better use password_file, \
                 password_credential or ${env:NAME}"
            }
            Place::OpenFile => {
                "a password is written in this file, which everyone on this machine may read; use \
                 password_file, password_credential or ${env:NAME}, or at least chmod o-r"
            }
            Place::CommandLine => {
                "there is a password on the command line, which everyone on this machine can see; \
                 use --password-file"
            }
        };
        self.warnings.push(it.problem(name, message));
    }

    /// The user name and password, from the URL or from their own fields.
    pub(super) fn credentials(
        &mut self,
        it: &Fields,
        username: Option<Secret>,
        password: Option<Secret>,
    ) -> (Option<Secret>, Option<Secret>) {
        if username.is_some() && it.has("username") {
            self.problems.push(it.problem("username", "there is a user name in the URL too"));
        }
        let ways = ["password", "password_file", "password_credential"];
        let used: Vec<_> = ways.into_iter().filter(|name| it.has(name)).collect();
        if password.is_some() && !used.is_empty() {
            self.problems.push(it.problem(used[0], "there is a password in the URL too"));
        } else if 1 < used.len() {
            self.problems.push(it.problem(used[1], format!("there is `{}` too", used[0])));
        }
        let username = username.or_else(|| it.text("username").map(Secret::new));
        let password = password
            .or_else(|| it.text("password").map(Secret::new))
            .or_else(|| self.secret_file(it, "password_file"))
            .or_else(|| self.credential(it));
        (username, password)
    }

    fn credential(&mut self, it: &Fields) -> Option<Secret> {
        const NAME: &str = "password_credential";
        let name = it.text(NAME)?;
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
        if !name.chars().all(fine) || name.starts_with('.') {
            let allowed = "a-z, A-Z, 0-9, `.`, `_`, `-`, `@`, and no `.` first";
            self.problems.push(it.problem(NAME, "this is no credential's name").allowed(allowed));
            return None;
        }
        if !self.around.options.secrets {
            return None;
        }
        let Some(folder) = (self.around.options.env)("CREDENTIALS_DIRECTORY") else {
            let message = "$CREDENTIALS_DIRECTORY is not set; systemd sets it for LoadCredential=";
            self.problems.push(it.problem(NAME, message));
            return None;
        };
        match read_secret(&PathBuf::from(folder).join(name)) {
            Ok(secret) => Some(Secret::new(secret)),
            Err(error) => {
                self.problems.push(it.problem(NAME, format!("the credential {name}: {error}")));
                None
            }
        }
    }

    /// The URL without credentials, its path absolute as far as `base` is.
    fn location(&mut self, it: &Fields, url: &SourceUrl, text: &str) -> String {
        match url {
            SourceUrl::File(path) => {
                let path = self.around.base.join(path);
                if self.around.options.files && !path.exists() {
                    let message = format!("{}: no such file", escaped(&path.display().to_string()));
                    self.warnings.push(it.problem("url", message));
                }
                // With one slash, so that nothing in it counts as percent-encoded.
                let path = path.display().to_string();
                let path = match path.strip_prefix("//") {
                    Some(rest) => format!("/{}", rest.trim_start_matches('/')),
                    None => path,
                };
                format!("file:{path}")
            }
            SourceUrl::Test(_) => text.to_owned(),
            SourceUrl::Rtsp(_) | SourceUrl::Http(_) => without_user(text),
        }
    }
}

fn health(it: &Fields, defaults: &Fields, url: &SourceUrl) -> Settings {
    let from = |name| if it.has(name) { it } else { defaults };
    let label = |name| from(name).bool(name).expect(DEFAULT);
    Settings {
        frozen_after: from("frozen_after").duration("frozen_after"),
        label_bad_pictures: label("label_bad_pictures"),
        label_corrupt_pictures: label("label_corrupt_pictures"),
        by_pts: !url.is_live(),
    }
}

/// A valid URL with an authority, without user name and password.
fn without_user(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |it| it.1);
    format!("{scheme}://{host}{rest}")
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use super::*;
    use crate::config::{Options, load_text};

    #[test]
    fn health_is_set_for_all_streams_or_for_one() {
        let text = "version: 1\n\
            defaults: {health: {frozen_after: 10s, label_bad_pictures: false}}\n\
            streams:\n  \
              a: {url: 'rtsp://cam/'}\n  \
              b: {url: 'clip.mp4', health: {frozen_after: off, label_corrupt_pictures: true}}\n  \
              c: {url: 'test:', health: {label_bad_pictures: true}}\n";
        let options = Options { env: |_| None, secrets: true, files: false };
        let load = |text: &str| load_text(text, Path::new("c"), Path::new("/c"), &options);
        let plan = load(text).unwrap().plan;
        let health = |id: &str| plan.streams[id].health;
        let settings = |seconds: Option<u64>, (bad, corrupt), by_pts| Settings {
            frozen_after: seconds.map(Duration::from_secs),
            label_bad_pictures: bad,
            label_corrupt_pictures: corrupt,
            by_pts,
        };
        assert_eq!(health("a"), settings(Some(10), (false, false), false));
        assert_eq!(health("b"), settings(None, (false, true), true));
        assert_eq!(health("c"), settings(Some(10), (true, false), true));
        let text = "version: 1\nstreams: {a: {url: 'rtsp://cam/'}}\n";
        assert_eq!(load(text).unwrap().plan.streams["a"].health, Settings::default());
        let problems = load(&text.replace("'}", "', health: {frozen_after: 1ms}}")).unwrap_err();
        assert!(problems.to_string().contains("health.frozen_after"), "{problems}");
    }
}
