//! The sink for NATS JetStream against real servers, Debian's and the newest.

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use async_nats::jetstream::{
    self,
    stream::{Config, DiscardPolicy},
};
use ghostwatch::{
    secret::Secret,
    sink::{
        broker::{Broker as _, Code, Message},
        nats::Nats,
        settings::{Login, Nats as Settings, NatsStream as Create, Tls},
    },
};

use crate::{
    support_server::{Server, code, deliver, deliver_all, message, messages, run, sized},
    support_tls::Files,
};

/// Runs a test with each server.
fn with_both(test: impl Fn(&Path)) {
    let newest = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/nats-server-2.15.1");
    for program in [PathBuf::from("/usr/sbin/nats-server"), newest] {
        println!("with {}", program.display());
        test(&program);
    }
}

/// A server with JetStream and more settings.
pub(crate) fn server(program: &Path, more: &str) -> Server {
    Server::new(program, |port, folder| {
        let config = folder.join("nats.conf");
        let store = folder.join("store");
        let base = format!("listen: 127.0.0.1:{port}\njetstream {{ store_dir: {store:?} }}\n");
        fs::write(&config, base + more).unwrap();
        vec!["-c".to_owned(), config.display().to_string()]
    })
}

pub(crate) fn settings(server: &Server) -> Settings {
    Settings {
        servers: vec![format!("nats://127.0.0.1:{}", server.port())],
        subject_prefix: "ghostwatch.v1".to_owned(),
        stream: "GHOSTWATCH".to_owned(),
        create: Create::default(),
        tls: None,
        login: Login::default(),
        timeout: Duration::from_secs(5),
    }
}

fn login(user: &str, password: &str) -> Login {
    let password = Some(Secret::new(password));
    Login { username: Some(user.to_owned()), password, token: None }
}

async fn client(server: &Server) -> jetstream::Context {
    let url = format!("127.0.0.1:{}", server.port());
    jetstream::new(async_nats::connect(url).await.unwrap())
}

/// Subject, `Nats-Msg-Id` and payload of every message that the stream holds, in its order.
async fn stored(server: &Server) -> Vec<(String, String, String)> {
    let mut stream = client(server).await.get_stream("GHOSTWATCH").await.unwrap();
    let state = stream.info().await.unwrap().state.clone();
    let mut all = Vec::new();
    for seq in state.first_sequence..=state.last_sequence {
        let it = stream.get_raw_message(seq).await.unwrap();
        let id = it.headers.get("Nats-Msg-Id").map(|it| it.to_string()).unwrap_or_default();
        all.push((it.subject.to_string(), id, String::from_utf8(it.payload.to_vec()).unwrap()));
    }
    all
}

fn expected(messages: &[Message]) -> Vec<(String, String, String)> {
    let one = |it: &Message| {
        let stream = it.stream.as_deref().unwrap();
        let subject = format!("ghostwatch.v1.{stream}.{}", it.topic.name());
        (subject, it.id.clone(), it.json.clone())
    };
    messages.iter().map(one).collect()
}

async fn assert_holds(server: &Server, messages: &[Message]) {
    let (found, wanted) = (stored(server).await, expected(messages));
    let ids = |it: &[(String, String, String)]| {
        it.iter().map(|it| it.1.clone()).collect::<Vec<_>>().join(" ")
    };
    assert!(found == wanted, "holds {}, not {}", ids(&found), ids(&wanted));
}

#[test]
fn events_have_their_subjects_and_ids_in_a_stream_that_is_made() {
    with_both(|program| {
        let server = server(program, "").started();
        let mut settings = settings(&server);
        settings.create = Create {
            max_age: Some(Duration::from_secs(86_400)),
            max_bytes: Some(64 << 20),
            replicas: 1,
            duplicate_window: Duration::from_secs(60),
        };
        let mut broker = Nats::new(settings);
        let sent = messages(1..=1000);
        run(async {
            broker.connect().await.unwrap();
            let (acked, result) = deliver(&mut broker, &sent).await;
            result.unwrap();
            assert_eq!(acked, vec![false; 1000]);
            // A retry is not stored again.
            let (acked, result) = deliver(&mut broker, &sent[600..]).await;
            result.unwrap();
            assert_eq!(acked, vec![true; 400]);
            broker.close().await;
            assert_holds(&server, &sent).await;
            let mut stream = client(&server).await.get_stream("GHOSTWATCH").await.unwrap();
            let config = &stream.info().await.unwrap().config;
            assert_eq!(config.subjects, ["ghostwatch.v1.>"]);
            assert_eq!(config.max_age, Duration::from_secs(86_400));
            assert_eq!((config.max_bytes, config.num_replicas), (64 << 20, 1));
            assert_eq!(config.duplicate_window, Duration::from_secs(60));
        });
    });
}

#[test]
fn a_stream_that_is_there_is_not_changed_and_must_take_our_subjects() {
    with_both(|program| {
        let server = server(program, "").started();
        run(async {
            let by_hand = client(&server).await;
            let config = |subjects: &[&str]| Config {
                name: "GHOSTWATCH".to_owned(),
                subjects: subjects.iter().map(|it| (*it).to_owned()).collect(),
                max_messages: 77,
                ..Config::default()
            };
            by_hand.create_stream(config(&["ghostwatch.v1.door.>"])).await.unwrap();
            let mut broker = Nats::new(settings(&server));
            let fault = broker.connect().await.unwrap_err();
            assert_eq!(fault.code, Code::NotFound, "{fault}");
            let wanted = "the stream GHOSTWATCH takes ghostwatch.v1.door.>, not \
                          ghostwatch.v1.*.frames; add `ghostwatch.v1.>`";
            assert!(fault.to_string().contains(wanted), "{fault}");
            let subjects = ["ghostwatch.v1.*.*", "more"];
            by_hand.update_stream(config(&subjects)).await.unwrap();
            broker.connect().await.unwrap();
            deliver(&mut broker, &messages(1..=3)).await.1.unwrap();
            let mut stream = by_hand.get_stream("GHOSTWATCH").await.unwrap();
            let config = &stream.info().await.unwrap().config;
            assert_eq!((config.max_messages, config.subjects.len()), (77, 2));
        });
    });
}

#[test]
fn a_server_that_is_down_at_start_is_refused_and_served_later() {
    with_both(|program| {
        let mut server = server(program, "");
        let mut broker = Nats::new(settings(&server));
        let sent = messages(1..=100);
        run(async {
            assert_eq!(code(broker.connect().await), Code::Refused);
            let start = |_: &_| {
                if server.child_is_missing() {
                    server.start()
                }
            };
            deliver_all(&mut broker, &sent, |_| (), start).await;
            assert_holds(&server, &sent).await;
        });
    });
}

#[test]
fn a_server_killed_while_it_takes_events_loses_and_reorders_none() {
    with_both(|program| {
        let server = RefCell::new(server(program, "").started());
        let sent = messages(1..=3000);
        let mut broker = Nats::new(settings(&server.borrow()));
        run(async {
            let kill = |count| {
                if [400, 1500, 2999].contains(&count) && !server.borrow().child_is_missing() {
                    server.borrow_mut().kill();
                }
            };
            let restart = |_: &_| {
                if server.borrow().child_is_missing() {
                    server.borrow_mut().start();
                }
            };
            let done = deliver_all(&mut broker, &sent, kill, restart).await;
            assert!(done.faults.len() >= 2, "{:?}", done.faults);
            println!("{} duplicates, {:?}", done.duplicates(), done.faults);
            if server.borrow().child_is_missing() {
                server.borrow_mut().start();
            }
            drop(broker);
            let server = server.into_inner();
            assert_holds(&server, &sent).await;
        });
    });
}

#[test]
fn a_server_that_stands_still_is_a_timeout_within_the_bound() {
    with_both(|program| {
        let server = server(program, "").started();
        let mut settings = settings(&server);
        settings.timeout = Duration::from_millis(700);
        let mut broker = Nats::new(settings);
        let sent = messages(1..=600);
        run(async {
            broker.connect().await.unwrap();
            server.freeze();
            let start = Instant::now();
            assert_eq!(code(deliver(&mut broker, &sent).await.1), Code::Timeout);
            assert_eq!(code(broker.connect().await), Code::Timeout);
            assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
            server.thaw();
            // What it was sent before it stood still, the server takes now, beside the retry.
            deliver_all(&mut broker, &sent, |_| (), |_| ()).await;
            assert_holds(&server, &sent).await;
        });
    });
}

#[test]
fn a_lost_connection_is_told_while_nothing_is_delivered() {
    with_both(|program| {
        let mut server = server(program, "").started();
        let mut broker = Nats::new(settings(&server));
        run(async {
            broker.connect().await.unwrap();
            server.kill();
            let lost = tokio::time::timeout(Duration::from_secs(5), broker.lost()).await;
            assert_eq!(lost.expect("told in time").code, Code::Error);
        });
    });
}

#[test]
fn wrong_passwords_and_missing_rights_are_refused() {
    let users = r#"accounts {
        A { jetstream: enabled, users: [
            { user: ghost, password: "s3cret%@/:" },
            { user: poor, password: boo, permissions: {
                publish: { allow: ["$JS.API.>"] }, subscribe: { allow: [">"] } } },
            { user: blind, password: boo, permissions: {
                publish: { allow: ["ghostwatch.>"] }, subscribe: { allow: [">"] } } } ] }
    }"#;
    with_both(|program| {
        let server = server(program, users).started();
        let with = |login| {
            let timeout = Duration::from_millis(800);
            Nats::new(Settings { login, timeout, ..settings(&server) })
        };
        run(async {
            assert_eq!(code(with(Login::default()).connect().await), Code::Auth);
            let said = with(login("ghost", "wr0ng")).connect().await.unwrap_err();
            assert_eq!(said.code, Code::Auth, "{said}");
            assert!(!format!("{said} {:?}", said.error).contains("wr0ng"), "{said}");
            let mut broker = with(login("ghost", "s3cret%@/:"));
            broker.connect().await.unwrap();
            deliver(&mut broker, &messages(1..=3)).await.1.unwrap();
            let mut poor = with(login("poor", "boo"));
            poor.connect().await.unwrap();
            let fault = deliver(&mut poor, &messages(4..=6)).await.1.unwrap_err();
            assert_eq!(fault.code, Code::Auth, "{fault}");
            let fault = with(login("blind", "boo")).connect().await.unwrap_err();
            assert_eq!(fault.code, Code::Auth, "{fault}");
        });
    });
}

#[test]
fn a_token_logs_in() {
    with_both(|program| {
        let server = server(program, "authorization { token: \"t0ken\" }\n").started();
        let with = |token: &str| {
            let token = Some(Secret::new(token));
            Nats::new(Settings { login: Login { token, ..Login::default() }, ..settings(&server) })
        };
        run(async {
            assert_eq!(code(with("other").connect().await), Code::Auth);
            with("t0ken").connect().await.unwrap();
        });
    });
}

#[test]
fn tls_is_used_and_a_stranger_is_not_trusted() {
    with_both(|program| {
        let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (authority, stranger) = (Files::write(ours.path()), Files::write(other.path()));
        let tls = format!(
            "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: true }}\n",
            authority.cert, authority.key, authority.ca
        );
        let server = server(program, &tls).started();
        let with = |ca: &Files, client: bool| {
            let tls = Tls {
                ca_file: Some(ca.ca.clone()),
                cert_file: client.then(|| authority.cert.clone()),
                key_file: client.then(|| authority.key.clone()),
            };
            Nats::new(Settings { tls: Some(tls), ..settings(&server) })
        };
        run(async {
            let mut broker = with(&authority, true);
            broker.connect().await.unwrap();
            assert_eq!(deliver(&mut broker, &messages(1..=300)).await.0.len(), 300);
            assert_eq!(code(with(&stranger, true).connect().await), Code::Tls);
            // The server asks for a certificate and gets none.
            assert_eq!(code(with(&authority, false).connect().await), Code::Tls);
        });
    });
}

#[test]
fn a_stream_deleted_while_running_is_noticed_and_made_again() {
    with_both(|program| {
        let server = server(program, "").started();
        let mut broker = Nats::new(settings(&server));
        run(async {
            broker.connect().await.unwrap();
            deliver(&mut broker, &messages(1..=10)).await.1.unwrap();
            client(&server).await.delete_stream("GHOSTWATCH").await.unwrap();
            let (acked, result) = deliver(&mut broker, &messages(11..=20)).await;
            assert_eq!((acked.len(), code(result)), (0, Code::NotFound));
            broker.connect().await.unwrap();
            deliver(&mut broker, &messages(11..=20)).await.1.unwrap();
            assert_holds(&server, &messages(11..=20)).await;
        });
    });
}

#[test]
fn a_message_that_is_too_large_is_told_and_the_rest_goes_on() {
    with_both(|program| {
        let server = server(program, "max_payload: 64KB\n").started();
        let mut broker = Nats::new(settings(&server));
        let mut sent = messages(1..=40);
        // One is beyond the server's limit, the other beyond the stream's.
        sent[9] = sized(10, 100_000);
        sent[29] = sized(30, 30_000);
        run(async {
            let config = Config {
                name: "GHOSTWATCH".to_owned(),
                subjects: vec!["ghostwatch.>".to_owned()],
                max_message_size: 20_000,
                ..Config::default()
            };
            client(&server).await.create_stream(config).await.unwrap();
            broker.connect().await.unwrap();
            for (from, to) in [(0, 9), (10, 29)] {
                let (acked, result) = deliver(&mut broker, &sent[from..]).await;
                let fault = result.unwrap_err();
                assert_eq!((acked.len(), fault.code), (to - from, Code::TooLarge), "{fault}");
            }
            deliver(&mut broker, &sent[30..]).await.1.unwrap();
            sent.remove(29);
            sent.remove(9);
            assert_holds(&server, &sent).await;
        });
    });
}

#[test]
fn a_full_stream_takes_no_later_event_before_an_earlier_one() {
    with_both(|program| {
        let server = server(program, "").started();
        let mut broker = Nats::new(settings(&server));
        // What does not fit is followed by what would.
        let sent = (1..=200).map(|it| sized(it, if it % 2 == 0 { 200 } else { 20_000 }));
        let sent = sent.collect::<Vec<_>>();
        run(async {
            let mut config = Config {
                name: "GHOSTWATCH".to_owned(),
                subjects: vec!["ghostwatch.>".to_owned()],
                discard: DiscardPolicy::New,
                max_bytes: 500_000,
                ..Config::default()
            };
            let by_hand = client(&server).await;
            by_hand.create_stream(config.clone()).await.unwrap();
            broker.connect().await.unwrap();
            let (acked, result) = deliver(&mut broker, &sent).await;
            let fault = result.unwrap_err();
            assert_eq!(fault.code, Code::Full, "{fault}");
            assert_holds(&server, &sent[..acked.len()]).await;
            config.max_bytes = 50_000_000;
            by_hand.update_stream(config).await.unwrap();
            deliver_all(&mut broker, &sent[acked.len()..], |_| (), |_| ()).await;
            assert_holds(&server, &sent).await;
        });
    });
}

#[test]
fn another_publisher_on_the_stream_is_no_fault_and_the_order_is_kept() {
    with_both(|program| {
        let server = server(program, "").started();
        let mut broker = Nats::new(settings(&server));
        let sent = messages(1..=1000);
        run(async {
            broker.connect().await.unwrap();
            let other = client(&server).await;
            let acked = RefCell::new(0);
            let disturb = async {
                let mut count = 0;
                while *acked.borrow() < 1000 {
                    let sent = other.publish("ghostwatch.v1.other.frames", "x".into()).await;
                    sent.unwrap().await.unwrap();
                    count += 1;
                }
                count
            };
            let publish = deliver_all(&mut broker, &sent, |it| *acked.borrow_mut() = it, |_| ());
            let (done, others) = tokio::join!(publish, disturb);
            println!("{others} messages of another publisher");
            assert!(done.faults.is_empty() && others > 3, "{others}: {:?}", done.faults);
            let mut found = stored(&server).await;
            found.retain(|it| it.0 != "ghostwatch.v1.other.frames");
            assert!(found == expected(&sent), "other messages, or in another order");
        });
    });
}

#[test]
fn a_server_without_jetstream_is_told_so() {
    with_both(|program| {
        let server = Server::new(program, |port, _| {
            ["-a", "127.0.0.1", "-p", &port.to_string()].map(str::to_owned).to_vec()
        })
        .started();
        let mut broker = Nats::new(settings(&server));
        let fault = run(broker.connect()).unwrap_err();
        assert_eq!(fault.code, Code::NotFound, "{fault}");
        assert!(fault.to_string().contains("is JetStream on?"), "{fault}");
    });
}

#[test]
fn a_server_of_the_list_that_answers_is_taken() {
    with_both(|program| {
        let server = server(program, "").started();
        let mut settings = settings(&server);
        settings.servers.insert(0, "nats://127.0.0.1:1".to_owned());
        let mut broker = Nats::new(settings);
        run(async {
            broker.connect().await.unwrap();
            deliver(&mut broker, &[message(1)]).await.1.unwrap();
        });
    });
}
