//! Encrypted sources: whom they trust, and what is told when they do not.

use std::fs;

use ghostwatch::{
    frame::{Code, State},
    source::{Spec, Tls, fingerprint::Fingerprint},
};

use crate::{
    source::{Out, first_failure, frames_of, run_until, spec},
    support_rtsp::{Media, Server},
    support_tls::{Authority, Shown},
};

const TRUSTING: Tls = Tls { verify: true, ca_file: None, fingerprint: None };

fn pattern() -> Media {
    Media::Pattern { size: (320, 240), fps: 25 }
}

fn check_opens(spec: &Spec) {
    let failed = |out: &[Out]| matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
    let ran = run_until(spec, |out| frames_of(out) == 3 || failed(out));
    assert_eq!(ran.frames().count(), 3, "{:?}", ran.changes().collect::<Vec<_>>());
}

fn check_refused(spec: &Spec) -> String {
    let (state, code, detail) = first_failure(spec);
    assert_eq!((state, code), (State::Down, Code::Tls), "{detail}");
    detail
}

#[test]
fn rtsps_trusts_the_authority_in_ca_file_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (right, wrong) = (Authority::new(), Authority::new());
    let file = |name: &str, pem: &str| {
        let path = folder.path().join(name);
        fs::write(&path, pem).unwrap();
        Some(path)
    };
    let ca_file = file("right.pem", &right.pem);
    let server = Server::start_tls(&pattern(), &right.sign("127.0.0.1").pem());
    let trusting = |tls| Spec { tls, ..spec(server.url()) };
    check_opens(&trusting(Tls { ca_file: ca_file.clone(), ..TRUSTING }));
    check_opens(&trusting(Tls { verify: false, ..TRUSTING }));
    check_refused(&trusting(TRUSTING));
    check_refused(&trusting(Tls { ca_file: file("wrong.pem", &wrong.pem), ..TRUSTING }));
    let missing = Some(folder.path().join("missing.pem"));
    let detail = check_refused(&trusting(Tls { ca_file: missing, ..TRUSTING }));
    assert!(detail.contains("missing.pem"), "{detail}");

    // The right authority, but for another host.
    let other = Server::start_tls(&pattern(), &right.sign("camera.example").pem());
    let tls = Tls { ca_file, ..TRUSTING };
    check_refused(&Spec { tls, ..spec(other.url()) });
}

#[test]
fn rtsps_with_a_fingerprint_trusts_that_certificate_and_no_other() {
    let shown = Shown::by_itself("camera.example");
    let server = Server::start_tls(&pattern(), &shown.pem());
    let pinned = |text: &str| {
        let fingerprint = Fingerprint::parse(text);
        assert!(fingerprint.is_some(), "{text}");
        Spec { tls: Tls { fingerprint, ..TRUSTING }, ..spec(server.url()) }
    };
    check_opens(&pinned(&shown.fingerprint));
    let other = Shown::by_itself("camera.example").fingerprint;
    let detail = check_refused(&pinned(&other));
    assert!(detail.contains(&shown.fingerprint) && detail.contains(&other), "{detail}");
}
