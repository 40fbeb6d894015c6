//! The sink for Redis Streams against a real server.

use std::time::{Duration, Instant};

use ghostwatch::{
    secret::Secret,
    sink::{
        broker::{Broker as _, Code, Message},
        redis::Redis,
        settings::{Login, Redis as Settings, Tls},
    },
};
use redis::{Client, Connection, streams::StreamRangeReply};

use crate::{
    support::wait_until,
    support_server::{Server, code, deliver, deliver_all, message, messages, run, sized},
    support_tls::Files,
};

const FRAMES: &str = "ghostwatch:4f2c9a71d0e3b586:frames";
const STATE: &str = "ghostwatch:4f2c9a71d0e3b586:state";

/// A server that keeps what it acknowledges, with these settings more.
pub(crate) fn server(more: &[&str]) -> Server {
    Server::new("redis-server", |port, folder| {
        let port = port.to_string();
        let folder = folder.display().to_string();
        let base = ["--port", &port, "--dir", &folder, "--bind", "127.0.0.1", "--save", ""];
        let log = ["--appendonly", "yes", "--appendfsync", "always"];
        base.iter().chain(&log).chain(more).map(|it| (*it).to_owned()).collect()
    })
}

pub(crate) fn settings(server: &Server) -> Settings {
    Settings {
        host: "127.0.0.1".to_owned(),
        port: server.port(),
        database: 0,
        key_prefix: "ghostwatch".to_owned(),
        max_entries: None,
        tls: None,
        login: Login::default(),
        timeout: Duration::from_secs(5),
    }
}

fn login(user: Option<&str>, password: &str) -> Login {
    let username = user.map(str::to_owned);
    Login { username, password: Some(Secret::new(password)), token: None }
}

/// A connection, once the server has read its data.
pub(crate) fn client(server: &Server) -> Connection {
    let client = Client::open(format!("redis://127.0.0.1:{}", server.port())).unwrap();
    let ready = || redis::cmd("PING").exec(&mut client.get_connection().unwrap()).is_ok();
    wait_until("redis answers", ready);
    client.get_connection().unwrap()
}

fn set(server: &Server, name: &str, value: &str) {
    let mut config = redis::cmd("CONFIG");
    config.arg("SET").arg(name).arg(value).exec(&mut client(server)).unwrap();
}

/// The numbers of a key's entries and the ids and events in them.
fn entries(server: &Server, key: &str) -> Vec<(String, String, String)> {
    let all: StreamRangeReply =
        redis::cmd("XRANGE").arg(key).arg("-").arg("+").query(&mut client(server)).unwrap();
    let entry = |it: &redis::streams::StreamId| {
        (it.id.clone(), it.get("id").unwrap(), it.get("event").unwrap())
    };
    all.ids.iter().map(entry).collect()
}

fn expected(messages: &[Message], key: &str) -> Vec<(String, String, String)> {
    let of_key = |it: &&Message| key.ends_with(it.topic.name());
    let entry = |it: &Message| (format!("{}-0", it.seq), it.id.clone(), it.json.clone());
    messages.iter().filter(of_key).map(entry).collect()
}

fn assert_holds(server: &Server, messages: &[Message]) {
    for key in [FRAMES, STATE] {
        let (found, wanted) = (entries(server, key), expected(messages, key));
        assert_eq!(found.len(), wanted.len(), "{key}");
        assert!(found == wanted, "{key}: other entries, or in another order");
    }
}

#[test]
fn events_have_their_names_numbers_and_ids() {
    let server = server(&[]).started();
    let mut broker = Redis::new(settings(&server));
    let sent = messages(1..=1000);
    run(async {
        broker.connect().await.unwrap();
        let (acked, result) = deliver(&mut broker, &sent).await;
        result.unwrap();
        assert_eq!(acked, vec![false; 1000]);
        broker.close().await;
    });
    assert_holds(&server, &sent);
}

#[test]
fn what_is_there_already_is_acknowledged_as_a_duplicate() {
    let server = server(&[]).started();
    let mut broker = Redis::new(settings(&server));
    let sent = messages(1..=300);
    run(async {
        broker.connect().await.unwrap();
        deliver(&mut broker, &sent[..200]).await.1.unwrap();
        // A consumer deletes one, a limit cuts the first ones off: both were stored.
        let mut by_hand = client(&server);
        redis::cmd("XDEL").arg(FRAMES).arg("150-0").exec(&mut by_hand).unwrap();
        redis::cmd("XTRIM").arg(FRAMES).arg("MAXLEN").arg(100).exec(&mut by_hand).unwrap();
        let (acked, result) = deliver(&mut broker, &sent[100..]).await;
        result.unwrap();
        assert_eq!(acked, [vec![true; 100], vec![false; 100]].concat());
    });
    assert_eq!(entries(&server, STATE), expected(&sent, STATE));
}

#[test]
fn a_key_that_another_program_writes_to_is_a_fault_and_no_duplicate() {
    let server = server(&[]).started();
    let mut broker = Redis::new(settings(&server));
    let mut by_hand = client(&server);
    redis::cmd("XADD").arg(FRAMES).arg("*").arg("a").arg("b").exec(&mut by_hand).unwrap();
    redis::cmd("XADD").arg(STATE).arg("7-0").arg("id").arg("x-7").exec(&mut by_hand).unwrap();
    run(async {
        broker.connect().await.unwrap();
        for seq in [6, 7] {
            let (acked, result) = deliver(&mut broker, &[message(seq)]).await;
            let fault = result.unwrap_err();
            assert!(acked.is_empty() && fault.code == Code::Error, "{fault}");
            assert!(fault.to_string().contains("another program writes to this key"), "{fault}");
        }
    });
}

#[test]
fn a_server_that_is_down_at_start_is_refused_and_served_later() {
    let mut server = server(&[]);
    let mut broker = Redis::new(settings(&server));
    let sent = messages(1..=100);
    let done = run(async {
        assert_eq!(code(broker.connect().await), Code::Refused);
        let start = |_: &_| {
            if server.child_is_missing() {
                server.start()
            }
        };
        deliver_all(&mut broker, &sent, |_| (), start).await
    });
    assert_eq!(done.duplicates(), 0);
    assert_holds(&server, &sent);
}

#[test]
fn a_server_killed_while_it_takes_events_loses_and_reorders_none() {
    let mut server = server(&[]).started();
    let mut broker = Redis::new(settings(&server));
    let sent = messages(1..=3000);
    let killed = std::cell::RefCell::new(&mut server);
    let done = run(async {
        let kill = |count| {
            if [400, 1500, 2999].contains(&count) && !killed.borrow().child_is_missing() {
                killed.borrow_mut().kill();
            }
        };
        let restart = |_: &_| {
            if killed.borrow().child_is_missing() {
                killed.borrow_mut().start();
            }
        };
        deliver_all(&mut broker, &sent, kill, restart).await
    });
    assert!(done.faults.len() >= 2, "{:?}", done.faults);
    if killed.borrow().child_is_missing() {
        killed.borrow_mut().start();
    }
    assert_holds(&server, &sent);
}

#[test]
fn a_server_that_stands_still_is_a_timeout_within_the_bound() {
    let server = server(&[]).started();
    let mut settings = settings(&server);
    settings.timeout = Duration::from_millis(500);
    let mut broker = Redis::new(settings);
    let sent = messages(1..=600);
    run(async {
        broker.connect().await.unwrap();
        server.freeze();
        let start = Instant::now();
        assert_eq!(code(deliver(&mut broker, &sent).await.1), Code::Timeout);
        assert_eq!(code(broker.connect().await), Code::Timeout);
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        server.thaw();
        // The server may still do what it was sent before it stood still.
        deliver_all(&mut broker, &sent, |_| (), |_| ()).await;
    });
    assert_holds(&server, &sent);
}

#[test]
fn a_lost_connection_is_told_while_nothing_is_delivered() {
    let mut server = server(&[]).started();
    let mut broker = Redis::new(settings(&server));
    run(async {
        broker.connect().await.unwrap();
        server.kill();
        let lost = tokio::time::timeout(Duration::from_secs(5), broker.lost()).await;
        assert_eq!(lost.expect("told in time").code, Code::Error);
    });
}

#[test]
fn wrong_passwords_and_missing_rights_are_refused() {
    let ghost = "--user ghost on >boo ~ghostwatch:* +ping +xadd +xrange +xinfo +multi +exec";
    let poor = "--user poor on >boo ~ghostwatch:* +ping +multi +exec";
    let mut more = vec!["--requirepass", "s3cret%@/:"];
    more.extend(ghost.split(' ').chain(poor.split(' ')));
    let server = server(&more).started();
    let with = |login| Redis::new(Settings { login, ..settings(&server) });
    run(async {
        let none = with(Login::default()).connect().await;
        assert_eq!(code(none), Code::Auth);
        let said = with(login(None, "wr0ng")).connect().await.unwrap_err();
        assert_eq!(said.code, Code::Auth);
        assert!(!format!("{said} {:?}", said.error).contains("wr0ng"), "{said}");
        assert_eq!(code(with(login(Some("ghost"), "no")).connect().await), Code::Auth);
        for login in [login(None, "s3cret%@/:"), login(Some("ghost"), "boo")] {
            let mut broker = with(login);
            broker.connect().await.unwrap();
            deliver(&mut broker, &messages(1..=3)).await.1.unwrap();
        }
        let mut poor = with(login(Some("poor"), "boo"));
        poor.connect().await.unwrap();
        let fault = deliver(&mut poor, &messages(4..=6)).await.1.unwrap_err();
        assert_eq!(fault.code, Code::Auth, "{fault}");
    });
}

#[test]
fn a_window_of_which_one_event_is_refused_is_not_stored_behind_it() {
    let half = "--user half on >boo ~ghostwatch:*:frames +ping +xadd +multi +exec";
    let server = server(&half.split(' ').collect::<Vec<_>>()).started();
    let mut broker =
        Redis::new(Settings { login: login(Some("half"), "boo"), ..settings(&server) });
    let sent = messages(1..=10);
    run(async {
        broker.connect().await.unwrap();
        let (acked, result) = deliver(&mut broker, &sent).await;
        assert_eq!(code(result), Code::Auth);
        assert_holds(&server, &sent[..acked.len()]);
    });
}

#[test]
fn tls_is_used_and_a_stranger_is_not_trusted() {
    let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (authority, stranger) = (Files::write(ours.path()), Files::write(other.path()));
    let server = Server::new("redis-server", |port, folder| {
        let it = [
            ("--port", "0".to_owned()),
            ("--tls-port", port.to_string()),
            ("--dir", folder.display().to_string()),
            ("--tls-cert-file", authority.cert.display().to_string()),
            ("--tls-key-file", authority.key.display().to_string()),
            ("--tls-ca-cert-file", authority.ca.display().to_string()),
        ];
        it.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    })
    .started();
    let with = |ca: &Files, client: bool| {
        let tls = Tls {
            ca_file: Some(ca.ca.clone()),
            cert_file: client.then(|| authority.cert.clone()),
            key_file: client.then(|| authority.key.clone()),
        };
        Redis::new(Settings { tls: Some(tls), ..settings(&server) })
    };
    run(async {
        let mut broker = with(&authority, true);
        broker.connect().await.unwrap();
        assert_eq!(deliver(&mut broker, &messages(1..=300)).await.0.len(), 300);
        assert_eq!(code(with(&stranger, true).connect().await), Code::Tls);
        // The server asks for a certificate and gets none.
        assert_eq!(code(with(&authority, false).connect().await), Code::Tls);
    });
}

#[test]
fn a_message_that_is_too_large_is_found_and_the_rest_goes_on() {
    let server = server(&["--proto-max-bulk-len", "1mb"]).started();
    let mut broker = Redis::new(settings(&server));
    let mut sent = messages(1..=20);
    sent[9] = sized(10, 2 << 20);
    run(async {
        broker.connect().await.unwrap();
        let (acked, result) = deliver(&mut broker, &sent).await;
        let fault = result.unwrap_err();
        assert_eq!((acked.len(), fault.code), (9, Code::TooLarge), "{fault}");
        assert!(fault.to_string().contains("4f2c9a71d0e3b586-10"), "{fault}");
        deliver(&mut broker, &sent[10..]).await.1.unwrap();
    });
    sent.remove(9);
    assert_holds(&server, &sent);
}

#[test]
fn a_server_without_memory_is_full_and_keeps_the_order() {
    let server = server(&["--maxmemory-policy", "noeviction"]).started();
    let used: String = redis::cmd("INFO").arg("memory").query(&mut client(&server)).unwrap();
    let line = used.lines().find_map(|it| it.strip_prefix("used_memory:")).unwrap();
    let limit = line.trim().parse::<u64>().unwrap() + (2 << 20);
    set(&server, "maxmemory", &limit.to_string());
    let mut broker = Redis::new(settings(&server));
    let sent = messages(1..=6000);
    run(async {
        broker.connect().await.unwrap();
        let (acked, result) = deliver(&mut broker, &sent).await;
        let fault = result.unwrap_err();
        assert_eq!(fault.code, Code::Full, "{fault}");
        assert!(!acked.is_empty());
        // Nothing of the window that was refused is stored.
        assert_holds(&server, &sent[..acked.len()]);
        set(&server, "maxmemory", "0");
        let rest = &sent[acked.len()..];
        assert_eq!(deliver_all(&mut broker, rest, |_| (), |_| ()).await.duplicates(), 0);
    });
    assert_holds(&server, &sent);
}

#[test]
fn only_about_so_many_entries_are_kept() {
    let server = server(&[]).started();
    let settings = Settings { max_entries: Some(500), ..settings(&server) };
    let mut broker = Redis::new(settings);
    run(async {
        broker.connect().await.unwrap();
        deliver(&mut broker, &messages(1..=3000)).await.1.unwrap();
    });
    wait_until("the key is cut", || (500..800).contains(&entries(&server, FRAMES).len()));
}

#[test]
fn a_replica_is_no_place_for_events() {
    let server = server(&["--replicaof", "127.0.0.1 1"]).started();
    let mut broker = Redis::new(settings(&server));
    run(async {
        broker.connect().await.unwrap();
        let fault = deliver(&mut broker, &messages(1..=3)).await.1.unwrap_err();
        assert_eq!(fault.code, Code::Error, "{fault}");
        assert!(fault.to_string().contains("READONLY"), "{fault}");
    });
}
