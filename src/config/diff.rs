//! What is different between two plans, and what of it needs a restart.

use std::collections::BTreeMap;

use crate::config::plan::Plan;

/// Names of what came, went and is not the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Only in the new plan.
    pub added: Vec<String>,
    /// Only in the old plan.
    pub removed: Vec<String>,
    /// In both, but not the same.
    pub changed: Vec<String>,
}

impl Changes {
    /// Whether nothing is different.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

/// What is different between two plans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// The streams, by id. A stream whose secret is not the same has changed.
    pub streams: Changes,
    /// The sinks, by name. A sink whose secret is not the same has changed.
    pub sinks: Changes,
    /// Whether the journal's retention is different.
    pub retain: bool,
    /// Whether the log's level is different.
    pub log_level: bool,
    /// Whether the HTTP token or the allowed hosts are different.
    pub http_access: bool,
    /// Settings that are different and need a restart, by path. If there is one, the whole new plan
    /// is to be refused.
    pub restart: Vec<&'static str>,
}

impl Diff {
    /// Whether nothing is different that has an effect.
    pub fn is_empty(&self) -> bool {
        *self == Diff::default()
    }
}

/// What has to be done to get from the old plan to the new one. `limits.max_streams` has no effect
/// of its own.
pub fn diff(old: &Plan, new: &Plan) -> Diff {
    let sinks = |plan: &Plan| -> BTreeMap<String, _> {
        plan.sinks.iter().map(|it| (it.name.clone(), it.clone())).collect()
    };
    let (model, device, batch) = (&old.model, &old.device, &old.batch);
    let fixed = [
        ("instance", old.instance == new.instance),
        ("model.weights", model.weights == new.model.weights),
        ("model.labels", model.labels == new.model.labels),
        ("model.name", model.name == new.model.name),
        ("model.resize", model.resize == new.model.resize),
        ("model.input", model.input == new.model.input),
        ("model.mean", model.mean == new.model.mean),
        ("model.std", model.std == new.model.std),
        ("device.use", device.device == new.device.device),
        ("device.precision", device.precision == new.device.precision),
        ("device.lanes", device.lanes == new.device.lanes),
        ("device.cuda", device.cuda == new.device.cuda),
        ("batch.max_size", batch.max_size == new.batch.max_size),
        ("batch.max_wait", batch.max_wait == new.batch.max_wait),
        ("batch.buckets", batch.buckets == new.batch.buckets),
        ("journal.path", old.journal.path == new.journal.path),
        ("journal.commit_every", old.journal.commit_every == new.journal.commit_every),
        ("http.listen", old.http.listen == new.http.listen),
        ("log.format", old.log.format == new.log.format),
        ("limits.max_width", old.limits.max_width == new.limits.max_width),
        ("limits.max_height", old.limits.max_height == new.limits.max_height),
    ];
    Diff {
        streams: changes(&old.streams, &new.streams),
        sinks: changes(&sinks(old), &sinks(new)),
        retain: old.journal.retain != new.journal.retain,
        log_level: old.log.level != new.log.level,
        http_access: old.http.token != new.http.token || old.http.hosts != new.http.hosts,
        restart: fixed.into_iter().filter(|it| !it.1).map(|it| it.0).collect(),
    }
}

fn changes<T: PartialEq>(old: &BTreeMap<String, T>, new: &BTreeMap<String, T>) -> Changes {
    let missing_in = |there: &BTreeMap<String, T>, here: &BTreeMap<String, T>| {
        here.keys().filter(|it| !there.contains_key(*it)).cloned().collect()
    };
    let changed = new.iter().filter(|it| old.get(it.0).is_some_and(|old| old != it.1));
    Changes {
        added: missing_in(old, new),
        removed: missing_in(new, old),
        changed: changed.map(|it| it.0.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Options, load_text};

    fn plan(text: &str) -> Plan {
        let options = Options { env: |_| None, secrets: true, files: false };
        let text = format!("version: 1\n{text}");
        load_text(&text, Path::new("c.yaml"), Path::new("/c"), &options).unwrap().plan
    }

    #[test]
    fn streams_come_go_and_change_each_by_name() {
        let old =
            plan("streams: {a: {url: 'test:'}, b: {url: 'test:'}, c: {url: 'rtsp://u:p@c/'}}");
        let new =
            plan("streams: {d: {url: 'test:'}, b: {url: 'test:'}, c: {url: 'rtsp://u:q@c/'}}");
        let it = diff(&old, &new);
        assert_eq!(it.streams.added, ["d"]);
        assert_eq!(it.streams.removed, ["a"]);
        assert_eq!(it.streams.changed, ["c"], "its password is another one");
        assert_eq!(Diff { streams: Changes::default(), ..it }, Diff::default());
    }

    #[test]
    fn the_same_plan_has_no_difference() {
        assert!(diff(&plan(""), &plan("limits: {max_streams: 5}")).is_empty());
    }

    #[test]
    fn a_default_changes_the_streams_that_use_it_only() {
        let streams = "streams: {a: {url: 'test:'}, b: {url: 'test:', max_fps: 2}}";
        let new = format!("{streams}\ndefaults: {{max_fps: 5}}");
        assert_eq!(diff(&plan(streams), &plan(&new)).streams.changed, ["a"]);
    }

    #[test]
    fn what_needs_a_restart_is_named() {
        let check = |text: &str, expected: &[&str]| {
            let it = diff(&plan(""), &plan(text));
            assert_eq!(it.restart, expected, "{text}");
            assert!(!it.is_empty());
        };
        check("batch: {max_size: 8}\njournal: {path: x.db}", &["batch.max_size", "journal.path"]);
        check("instance: other", &["instance"]);
        check("model: {weights: x, mean: [0, 0, 0]}", &["model.weights", "model.mean"]);
        check("log: {level: debug}", &[]);
        check("journal: {retain: {age: 1d}}", &[]);
        check("http: {hosts: [a]}", &[]);
        check("sinks: [{type: stdout}]", &[]);
    }
}
