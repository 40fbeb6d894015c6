//! Sources over HTTP: files, the MJPEG of cheap cameras, and what is told when it fails.

use std::{fs, time::Duration};

use ghostwatch::{
    frame::{Code, State},
    secret::Secret,
    source::{End, Spec, Tls},
};

use crate::{
    source::{Out, clip, first_failure, frames_of, run_until, spec},
    support_http::{Content, Server},
    support_media::{ffmpeg, jpegs},
    support_tls::{Authority, Shown},
};

fn has_failed(out: &[Out]) -> bool {
    matches!(out.last(), Some(Out::State(it)) if it.code.is_some())
}

#[test]
fn a_file_over_http_gives_every_picture_and_ends_wherever_its_index_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("end.mp4");
    ffmpeg("-f lavfi -i testsrc=size=320x240:rate=25:duration=2 -c:v libx264", &path);
    let last = fs::read(path).unwrap();
    for (bytes, frames) in [(fs::read(clip("bigbuckbunny.mp4")).unwrap(), 132), (last, 50)] {
        let server = Server::start(Content::File(bytes));
        let ran = run_until(&spec(server.url()), has_failed);
        assert_eq!(ran.end, End::Ended, "{:?}", ran.changes().collect::<Vec<_>>());
        assert_eq!(ran.frames().count(), frames);
        assert!(ran.metas().zip(ran.metas().skip(1)).all(|(a, b)| a.pts < b.pts));
    }
}

#[test]
fn mjpeg_over_http_gives_every_picture_whatever_its_size_and_its_end_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = [(640, 360), (320, 240), (641, 361)];
    let pictures = sizes.iter().flat_map(|it| jpegs(folder.path(), *it, 5)).collect();
    let server = Server::start(Content::Mjpeg(pictures, Duration::from_millis(40)));
    let ran = run_until(&spec(server.url()), has_failed);
    let changes: Vec<_> = ran.changes().collect();
    let expected: Vec<_> = sizes.iter().flat_map(|it| [*it; 5]).collect();
    assert_eq!(ran.metas().map(|it| it.size).collect::<Vec<_>>(), expected, "{changes:?}");
    assert_eq!(ran.states()[2], (State::Down, Some(Code::Eos)), "{changes:?}");
}

#[test]
fn http_refusals_have_their_names() {
    for (status, expected) in [
        ("401 Unauthorized", Code::Auth),
        ("403 Forbidden", Code::Auth),
        ("404 Not Found", Code::NotFound),
        ("500 Internal Server Error", Code::Error),
    ] {
        let server = Server::start(Content::Status(status));
        let right = Spec {
            username: Some(Secret::new("viewer")),
            password: Some(Secret::new("canary")),
            ..spec(server.url())
        };
        for it in [spec(server.url()), right] {
            let (state, code, detail) = first_failure(&it);
            assert_eq!((state, code), (State::Down, expected), "{status}: {detail}");
            assert!(!detail.contains("canary"), "{detail}");
        }
    }
}

#[test]
fn https_trusts_the_authority_in_ca_file_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (right, wrong) = (Authority::new(), Authority::new());
    let file = |name: &str, pem: &str| {
        let path = folder.path().join(name);
        fs::write(&path, pem).unwrap();
        Some(path)
    };
    let own = Shown::by_itself("127.0.0.1");
    // A server for each: TLS that was agreed upon once is taken up again with the same server
    // without another look at its certificate.
    let start = |shown: &Shown, verify, ca_file| {
        let bytes = fs::read(clip("carphone_pristine.mp4")).unwrap();
        let server = Server::start_tls(Content::File(bytes), shown);
        let tls = Tls { verify, ca_file, fingerprint: None };
        let spec = Spec { tls, ..spec(server.url()) };
        (server, spec)
    };
    let signed = right.sign("127.0.0.1");
    for (_server, it) in [
        start(&signed, true, file("right.pem", &right.pem)),
        start(&signed, false, None),
        // A camera's own certificate as its authority: what stands in for a fingerprint.
        start(&own, true, file("own.pem", &own.certificate)),
    ] {
        let ran = run_until(&it, |out| frames_of(out) == 3 || has_failed(out));
        assert_eq!(ran.frames().count(), 3, "{:?}", ran.changes().collect::<Vec<_>>());
    }
    for (_server, it) in [
        start(&signed, true, file("wrong.pem", &wrong.pem)),
        start(&signed, true, None),
        start(&right.sign("camera.example"), true, file("right.pem", &right.pem)),
    ] {
        let (state, code, detail) = first_failure(&it);
        assert_eq!((state, code), (State::Down, Code::Tls), "{detail}");
    }
}

#[test]
fn an_error_behind_tls_is_not_one_of_tls() {
    let shown = Shown::by_itself("127.0.0.1");
    let server = Server::start_tls(Content::Status("500 Internal Server Error"), &shown);
    let tls = Tls { verify: false, ca_file: None, fingerprint: None };
    let (state, code, detail) = first_failure(&Spec { tls, ..spec(server.url()) });
    assert_eq!((state, code), (State::Down, Code::Error), "{detail}");
}
