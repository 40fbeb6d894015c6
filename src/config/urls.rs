//! A plan from URLs alone, for a start without a configuration file.

use std::{collections::HashSet, path::Path};

use crate::{
    config::{
        Loaded, Options,
        build::{Place, Surroundings},
        check,
        node::{Node, Tree},
        plan::Plan,
        problem::{Problem, Problems, escaped},
        read::ENTRIES_MAX,
    },
    secret::Secret,
    source::url::SourceUrl,
};

impl Plan {
    /// The plan for these URLs or paths, with the defaults for everything else. Ids come from the
    /// file's or host's name. `password` is for the streams that can have one and bring none.
    /// Relative paths, the weights' and the journal's among them, are relative to `base`.
    ///
    /// # Errors
    /// Everything that is wrong with the URLs, without quoting them.
    pub fn from_urls(
        urls: &[String],
        password: Option<&Secret>,
        base: &Path,
        options: &Options,
    ) -> Result<Loaded, Problems> {
        let mut problems = Vec::new();
        let mut used = HashSet::new();
        let mut streams = Vec::new();
        for (i, url) in urls.iter().enumerate() {
            match SourceUrl::parse(url) {
                Ok(it) => {
                    let id = unique(&name(&it.url), &mut used);
                    streams.push((id, Node::map([("url", Node::text(url))])));
                }
                Err(error) => {
                    let message = escaped(&error.to_string());
                    problems.push(Problem::new(None, format!("URL {}", i + 1), message));
                }
            }
        }
        if ENTRIES_MAX < urls.len() {
            let problem = Problem::new(None, "", format!("there are {} URLs", urls.len()));
            problems.push(problem.allowed(format!("at most {ENTRIES_MAX}")));
        }
        if !problems.is_empty() {
            return Err(Problems::new("", problems));
        }
        let version = Node::made(Tree::Int(1));
        let root = Node::map([("version", version), ("streams", Node::map(streams))]);
        let mut loaded = check(
            &root,
            Path::new(""),
            &Surroundings { base, options, place: Place::CommandLine },
        )?;
        for stream in loaded.plan.streams.values_mut().filter(|it| it.is_live()) {
            stream.password = stream.password.take().or_else(|| password.cloned());
        }
        Ok(loaded)
    }
}

/// What a stream is called after.
fn name(url: &SourceUrl) -> String {
    match url {
        SourceUrl::File(path) => {
            path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
        }
        SourceUrl::Rtsp(remote) | SourceUrl::Http(remote) => remote.host.clone(),
        SourceUrl::Test(_) => "test".to_owned(),
    }
}

/// An id that looks like `name` and is not in `used`, where it then is.
fn unique(name: &str, used: &mut HashSet<String>) -> String {
    // Room for a number after it.
    const LONGEST: usize = 56;
    let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let id: String = name.chars().map(letter).collect();
    let id = id.trim_matches('-');
    let id = if id.is_empty() { "stream" } else { &id[..id.len().min(LONGEST)] };
    let mut numbered = id.to_owned();
    let mut number = 1;
    while !used.insert(numbered.clone()) {
        number += 1;
        numbered = format!("{id}-{number}");
    }
    numbered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::build::is_id;

    fn plan(urls: &[&str], password: Option<&str>) -> Result<Loaded, Problems> {
        let urls: Vec<_> = urls.iter().map(|it| (*it).to_owned()).collect();
        let options = Options { env: |_| None, secrets: true, files: false };
        let password = password.map(Secret::new);
        Plan::from_urls(&urls, password.as_ref(), Path::new("/here"), &options)
    }

    #[test]
    fn ids_come_from_names_and_are_unique_and_valid() {
        let long = format!("/{}é.mp4", "x".repeat(200));
        let urls = [
            "a/Yard 1.mp4",
            "b/yard_1.mkv",
            "rtsp://cam-1.example/x",
            "rtsp://cam-1.example/y",
            "test:",
            "/é.mp4",
            "rtsp://[::1]/",
            &long,
        ];
        let loaded = plan(&urls, None).unwrap();
        let ids: Vec<_> = loaded.plan.streams.keys().map(String::as_str).collect();
        assert_eq!(
            ids[..7],
            [
                "1",
                "cam-1-example",
                "cam-1-example-2",
                "stream",
                "test",
                "x".repeat(56).as_str(),
                "yard-1"
            ]
        );
        assert_eq!(ids[7..], ["yard-1-2"]);
        assert!(ids.iter().all(|it| is_id(it)));
        assert_eq!(loaded.plan.streams["yard-1"].url.expose(), "file:/here/a/Yard 1.mp4");
        assert_eq!(loaded.plan.journal.path, Path::new("/here/data/journal.db"));
    }

    #[test]
    fn the_password_goes_to_streams_that_can_have_one_and_bring_none() {
        let urls = ["rtsp://u@a/", "rtsp://u:own@b/", "test:"];
        let loaded = plan(&urls, Some("given")).unwrap();
        let password = |id: &str| loaded.plan.streams[id].password.as_ref().map(Secret::expose);
        assert_eq!(
            (password("a"), password("b"), password("test")),
            (Some("given"), Some("own"), None)
        );
        assert_eq!(loaded.plan.streams["b"].url.expose(), "rtsp://b/");
        assert!(loaded.warnings.to_string().contains("on the command line"));
        assert!(!format!("{loaded:?}").contains("own\""), "{loaded:?}");
    }

    #[test]
    fn every_wrong_url_is_named_by_its_place() {
        let problems = plan(&["test:", "exec:rm", "rtsp://:canary@/"], None).unwrap_err();
        let text = problems.to_string();
        assert_eq!(problems.list.len(), 2);
        assert!(text.starts_with("URL 2: unknown scheme `exec`"), "{text}");
        assert!(!text.contains("canary"), "{text}");
    }
}
