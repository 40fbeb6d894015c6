//! Orders over real sockets.

use super::*;

const NO_JOURNAL: &str = "/nonexistent/journal.db";

fn next(control: &Control) -> Order {
    loop {
        match control.next() {
            Some(order) => return order,
            None => thread::yield_now(),
        }
    }
}

#[test]
fn paths_name_a_stream_and_an_action() {
    assert_eq!(route("/api/v1/streams/front/restart"), Some(("front", Action::Restart)));
    assert_eq!(route("/api/v1/streams/a/disable"), Some(("a", Action::Disable)));
    for path in ["/", "/api/v1/streams/front", "/api/v1/streams/front/x", "/front/restart"] {
        assert_eq!(route(path), None, "{path}");
    }
}

#[test]
fn an_order_reaches_the_loop_and_its_answer_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.sock");
    // Left over from a daemon that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let control = Control::listen(&path, NO_JOURNAL.as_ref()).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let answers = [
        Answer::Done("done".to_owned()),
        Answer::Unknown("no".to_owned()),
        Answer::Refused("not now".to_owned()),
    ];
    let places = [path.clone()];
    let ask = |it| order(&places, Some(NO_JOURNAL.as_ref()), it, "front").unwrap();
    thread::scope(|scope| {
        let asking = scope.spawn(|| Action::ALL.map(ask));
        for (action, answer) in Action::ALL.into_iter().zip(&answers) {
            let order = next(&control);
            assert_eq!((order.action, &*order.stream), (action, "front"));
            order.answer(answer.clone());
        }
        assert_eq!(asking.join().unwrap(), answers);
    });
    drop(control);
    assert!(!path.exists());
    let gone = order(&[path.clone(), path], None, Action::Restart, "front");
    let error = gone.unwrap_err().to_string();
    assert!(error.contains("no daemon listens at"), "{error}");
}

#[test]
fn a_socket_that_is_left_over_hides_no_other_and_a_daemon_with_another_journal_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["mine.db", "other.db"] {
        fs::write(at(name), "").unwrap();
    }
    fs::hard_link(at("mine.db"), at("by-another-path.db")).unwrap();
    let left = std::os::unix::net::UnixListener::bind(at("left.sock")).unwrap();
    drop(left);
    let other = Control::listen(&at("other.sock"), &at("other.db")).unwrap();
    let mine = Control::listen(&at("mine.sock"), &at("by-another-path.db")).unwrap();
    let ask = |sockets: &[&str], journal: Option<&str>| {
        let places: Vec<_> = sockets.iter().map(|it| at(it)).collect();
        let journal = journal.map(at);
        order(&places, journal.as_deref(), Action::Disable, "front").unwrap()
    };
    let done = |control: &Control, answered: &str, sockets: &[&str], journal: Option<&str>| {
        thread::scope(|scope| {
            let asking = scope.spawn(|| ask(sockets, journal));
            next(control).answer(Answer::Done(answered.to_owned()));
            assert_eq!(asking.join().unwrap(), Answer::Done(answered.to_owned()));
        });
    };
    let long = "a".repeat(120);
    // What is no socket, and what can be none, hide no other either.
    let sockets = ["gone.sock", "mine.db/x", &*long, "left.sock", "other.sock", "mine.sock"];
    done(&mine, "mine", &sockets, Some("mine.db"));
    let sockets = ["left.sock", "other.sock", "mine.sock"];
    done(&other, "any", &sockets, Some("not-there.db"));
    done(&other, "the first", &sockets, None);
    let Answer::Refused(why) = ask(&["left.sock", "other.sock"], Some("mine.db")) else {
        panic!("the other daemon took it");
    };
    let named = at("other.db").display().to_string();
    assert!(why.contains("writes to another journal") && why.contains(&named), "{why}");
    assert!(other.next().is_none() && mine.next().is_none());
    let places = ["gone.sock", &*long, "left.sock"].map(at);
    let error = order(&places, None, Action::Disable, "front").unwrap_err().to_string();
    assert!(error.contains("aaa is longer than the 107 bytes"), "{error}");
}

#[test]
fn a_daemon_is_looked_for_beside_its_journal_and_where_systemd_has_it() {
    let journal = Path::new("data/site.db");
    let expected = ["data/site.db.sock", "/run/ghostwatch/api.sock"].map(PathBuf::from);
    assert_eq!(places_in(None, journal), expected);
    let places = places_in(Some(Path::new("/run/other")), journal);
    assert_eq!(places[0], Path::new("/run/other/api.sock"));
    assert_eq!(places[1..], expected);
}

#[test]
fn what_cannot_be_a_socket_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, "precious").unwrap();
    let listen = |path: &Path| Control::listen(path, NO_JOURNAL.as_ref());
    let error = |path: &Path| listen(path).err().unwrap().to_string();
    assert!(error(&path).ends_with("is there and is no socket"), "{}", error(&path));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let taken = folder.path().join("taken");
    let _other = std::os::unix::net::UnixListener::bind(&taken).unwrap();
    assert!(error(&taken).contains("somebody listens at"), "{}", error(&taken));
    assert!(taken.exists());
    let long = folder.path().join("a".repeat(120));
    assert!(error(&long).contains("107 bytes"), "{}", error(&long));
}
