//! Sinks as they are written, and as they can be run.

use std::path::Path;

use expect_test::{Expect, expect};

use super::*;
use crate::config::{Options, load_text, plan::Plan};

fn env(name: &str) -> Option<String> {
    (name == "KEY").then(|| "secret-from-env".to_owned())
}

fn read(sinks: &str) -> Result<Plan, String> {
    let text = format!(
        "version: 1\ninstance: box\nstreams: {{yard: {{url: /srv/yard.mp4}}}}\nsinks: [{sinks}]\n"
    );
    let options = Options { env, secrets: true, files: false };
    let loaded = load_text(&text, Path::new("c.yaml"), Path::new("/etc/gw"), &options);
    loaded.map(|it| it.plan).map_err(|it| it.to_string())
}

#[test]
fn each_broker_has_settings_that_work_as_they_are() {
    let plan = read(
        "{type: nats, servers: ['nats://a:4222']}, {type: redis, url: redis://b}, \
         {type: mqtt, url: mqtts://c}, {type: webhook, url: 'https://d/in?key=k'}",
    )
    .unwrap();
    let targets: Vec<_> = plan.sinks.iter().map(|it| (&*it.name, &it.target)).collect();
    let [
        (_, Target::Nats(nats)),
        (_, Target::Redis(redis)),
        (_, Target::Mqtt(mqtt)),
        (_, Target::Webhook(webhook)),
    ] = targets[..]
    else {
        panic!("{targets:?}");
    };
    assert_eq!(
        (&*nats.subject_prefix, &*nats.stream, &nats.tls),
        ("ghostwatch.v1", "GHOSTWATCH", &None)
    );
    assert_eq!((&*redis.host, redis.port, redis.database, &redis.tls), ("b", 6379, 0, &None));
    assert_eq!((mqtt.address.port, mqtt.address.tls), (8883, true));
    assert_eq!(mqtt.client_id, "ghostwatch-box-mqtt");
    assert_eq!((webhook.batch_events, webhook.batch_bytes), (500, 1 << 20));
    assert!(!format!("{plan:?}").contains("key=k"), "a webhook's URL is a secret");
}

#[test]
fn everything_that_can_be_said_is_heard() {
    let plan = read(
        "{type: redis, name: r, url: 'rediss://[::1]:7000/3', username: u, password: '${env:KEY}', \
          prefix: gw/a, max_entries: 1000, timeout: 3s, types: [frames, gap], streams: [yard], \
          min_confidence: 0.5, top: 2}, \
         {type: nats, servers: ['tls://a', 'tls://b'], tls: {}, stream: S, replicas: 3, \
          max_age: 7d, max_bytes: 1GiB, duplicate_window: 10m}, \
         {type: mqtt, url: 'mqtt://c:1', client_id: me, keep_alive: 5s, retain_label: false, \
          message_bytes: 64KiB}, \
         {type: webhook, url: 'http://d', headers: ['X-Key: ${env:KEY}'], batch_events: 5, \
          batch_bytes: 2KiB}",
    )
    .unwrap();
    let it = &plan.sinks[0];
    assert_eq!(
        it.select,
        Select {
            topics: vec![Topic::Frames, Topic::Gap],
            streams: vec!["yard".into()],
            min_confidence: Some(0.5),
            top: Some(2),
        }
    );
    let Target::Redis(redis) = &it.target else { panic!("{it:?}") };
    assert_eq!((&*redis.host, redis.port, redis.database), ("[::1]", 7000, 3));
    assert_eq!(redis.login.password.as_ref().unwrap().expose(), "secret-from-env");
    assert_eq!((redis.max_entries, redis.timeout), (Some(1000), Duration::from_secs(3)));
    let Target::Nats(nats) = &plan.sinks[1].target else { panic!() };
    assert_eq!((nats.servers.len(), nats.tls.is_some(), nats.create.replicas), (2, true, 3));
    assert_eq!(nats.create.duplicate_window, Duration::from_secs(600));
    let Target::Mqtt(mqtt) = &plan.sinks[2].target else { panic!() };
    assert_eq!((&*mqtt.client_id, mqtt.retain_label, mqtt.packet_bytes_max), ("me", false, 65536));
    let Target::Webhook(webhook) = &plan.sinks[3].target else { panic!() };
    assert_eq!(
        (&*webhook.headers[0].0, webhook.headers[0].1.expose()),
        ("X-Key", "secret-from-env")
    );
    assert!(!format!("{plan:?}").contains("secret-from-env"));
}

#[test]
fn what_cannot_be_is_told_with_its_place() {
    let check = |sinks: &str, said: Expect| said.assert_eq(&read(sinks).unwrap_err());
    check(
        "{type: nats}, {type: redis}, {type: file}",
        expect![[r#"
        c.yaml:4:9: sinks[0].servers: a nats sink needs it
        c.yaml:4:23: sinks[1].url: a redis sink needs it
        c.yaml:4:38: sinks[2].path: a file sink needs it"#]],
    );
    check(
        "{type: nats, servers: ['nats://u:p@h'], path: x, url: y}",
        expect![[r#"
        c.yaml:4:31: sinks[0].servers: these are no addresses of NATS servers; allowed: nats://host:port, without user name and password
        c.yaml:4:55: sinks[0].path: only a file sink can have this
        c.yaml:4:63: sinks[0].url: only a redis or mqtt or webhook sink can have this"#]],
    );
    check(
        "{type: redis, url: 'http://x'}, {type: mqtt, url: 'mqtt://h/x'}",
        expect![[r#"
        c.yaml:4:28: sinks[0].url: the URL must start with redis:// or rediss://
        c.yaml:4:59: sinks[1].url: nothing can stand after the port"#]],
    );
    check(
        "{type: redis, url: 'redis://h/x'}, {type: stdout, tls: {}}",
        expect![[r#"
        c.yaml:4:28: sinks[0].url: what stands after the slash is no database; allowed: a number from 0
        c.yaml:4:64: sinks[1].tls: only a nats or redis or mqtt or kafka or webhook sink can have this"#]],
    );
    check(
        "{type: mqtt, url: 'mqtt://h', tls: {cert_file: c}, prefix: 'a/#'}",
        expect![[r#"
        c.yaml:4:44: sinks[0].tls: the URL says mqtt://, which has no TLS
        c.yaml:4:56: sinks[0].tls.cert_file: cert_file and key_file come together
        c.yaml:4:68: sinks[0].prefix: `a/#` has other characters; allowed: a-z, A-Z, 0-9, `.`, `_`, `-`, `/`
        c.yaml:4:68: sinks[0].prefix: "a/#" must have 1 to 256 bytes, no `+`, `#` or control characters, and no `$` in front"#]],
    );
    check(
        "{type: stdout, streams: [front], types: [labels], top: 6}",
        expect![[r#"
        c.yaml:4:33: sinks[0].streams: there is no stream front
        c.yaml:4:50: sinks[0].types[0]: `labels` is unknown; allowed: frames, state, gap, daemon
        c.yaml:4:64: sinks[0].top: 6 is out of range; allowed: 1 to 5"#]],
    );
    check(
        "{type: webhook, url: 'http://h', headers: ['nonsense'], token_file: /nowhere}",
        expect![[r#"
            c.yaml:4:51: sinks[0].headers: a header has no colon; allowed: Name: value
            c.yaml:4:77: sinks[0].token_file: /nowhere: No such file or directory (os error 2)"#]],
    );
}

#[test]
fn what_a_broker_would_refuse_only_later_is_told_at_once() {
    let check = |sink: &str, said: &str| {
        let told = read(sink).unwrap_err();
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines.len(), 1, "{told}");
        let found = lines[0].split_once(": sinks[0].").map(|it| it.1);
        assert_eq!(found.and_then(|it| it.strip_prefix(said)).map(|_| ()), Some(()), "{told}");
    };
    let hook = |url: &str, said: &str| check(&format!("{{type: webhook, url: '{url}'}}"), said);
    hook("ftp://h/?token=s", "url: it must begin with http:// or https://");
    hook("http://a b/", "url: it is no URL: ");
    hook("https://u:p@h/", "url: it holds a user or password");
    hook("https:///x", "url: it ");
    hook("https://h:99999/", "url: its port is no number");
    hook("h/in", "url: it is no URL: ");
    let header = |text: &str, said: &str| {
        check(&format!("{{type: webhook, url: 'http://h', headers: [\"{text}\"]}}"), said);
    };
    header("X Key: v", "headers: \"X Key\" is no name of a header");
    header("X-Key: a\\nb", "headers: \"X-Key\" has a value with characters");
    let nats = |server: &str, said: &str| {
        check(&format!("{{type: nats, servers: ['nats://ok', '{server}']}}"), said);
    };
    nats("http://h:4222", "servers: \"http://h:4222\" is no address: invalid scheme");
    nats("nats://h:99999", "servers: \"nats://h:99999\" is no address: ");
    nats("nats://", "servers: \"nats://\" is no address: it names no host");
    let prefix = |it: &str, said: &str| {
        check(&format!("{{type: nats, servers: ['nats://h'], {it}}}"), said);
    };
    for odd in ["a..b", ".a", "a."] {
        prefix(&format!("prefix: '{odd}'"), &format!("prefix: \"{odd}\" has an empty part"));
    }
    prefix("stream: 'A.B'", "stream: \"A.B\" has a space");
    assert!(!read("{type: webhook, url: 'ftp://h/?token=s3cret'}").unwrap_err().contains("s3cret"));
}

#[test]
fn two_mqtt_sinks_that_would_be_in_each_others_way_are_refused() {
    let two = |second: &str| {
        read(&format!(
            "{{type: mqtt, name: a, url: 'mqtt://Broker'}}, {{type: mqtt, name: b, {second}}}"
        ))
    };
    let told = two("url: 'mqtt://broker:1883'").unwrap_err();
    let why = "sinks[1].prefix: sink a has \"ghostwatch\" on broker:1883 too: both would write ghostwatch/available and the last labels";
    assert!(told.contains(why), "{told}");
    let told = two("url: 'mqtt://broker', prefix: gw, client_id: ghostwatch-box-a").unwrap_err();
    let why = "sinks[1].client_id: sink a has \"ghostwatch-box-a\" on broker:1883 too: the broker would end one connection";
    assert!(told.contains(why), "{told}");
    two("url: 'mqtt://broker', prefix: gw").unwrap();
    two("url: 'mqtt://broker:1884'").unwrap();
    two("url: 'mqtt://other'").unwrap();
}
