//! Tests of fetching, against a real HTTP server on this machine.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    process::Command,
    thread,
};

use super::*;

fn published_bytes() -> Vec<u8> {
    let path = "tests/golden/weights/legacy.pth";
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// A folder of the test's own, empty.
fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ghostwatch-{name}-{}", std::process::id()));
    drop(fs::remove_dir_all(&path));
    fs::create_dir_all(&path).unwrap();
    path
}

fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name());
    names.map(|it| it.into_string().unwrap()).collect()
}

/// Reads one request; gives its first line.
fn request(stream: &TcpStream) -> String {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap().unwrap();
    for line in lines {
        if line.unwrap().is_empty() {
            break;
        }
    }
    first
}

fn ok(announced: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

/// Fetches into `dest` from a server that answers its connections with the given bytes in turn.
fn fetch_from(answers: &[Vec<u8>], blob_id: &str, dest: &Path) -> Result<Checkpoint, FetchError> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/w.pth", listener.local_addr().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                request(&stream);
                // The client may hang up first; that is its right.
                drop(stream.write_all(answer));
            }
        });
        let published = Published { url: &url, blob_id };
        fetch(published, dest, &ProgressBar::hidden(), &|_| Ok(()))
    })
}

#[test]
fn the_published_file_is_converted_and_says_where_it_comes_from() {
    let (bytes, folder) = (published_bytes(), folder("fetch"));
    let (dest, id) = (folder.join("w.safetensors"), blob_id(&bytes));
    let checkpoint = fetch_from(&[ok(bytes.len(), &bytes)], &id, &dest).unwrap();
    assert_eq!(weights::read(&dest).unwrap(), checkpoint);
    let metadata = checkpoint.metadata;
    assert_eq!((metadata.resize, metadata.input), (256, 224));
    assert_eq!(metadata.provenance["origin"], "published");
    assert_eq!(metadata.provenance["source_git_blob"], id);
    assert!(metadata.provenance["source"].ends_with("/w.pth"));
    assert_eq!(files(&folder), ["w.safetensors"]);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn redirects_are_followed() {
    let (bytes, folder) = (published_bytes(), folder("redirect"));
    let moved =
        b"HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let answers = [moved.to_vec(), ok(bytes.len(), &bytes)];
    fetch_from(&answers, &blob_id(&bytes), &folder.join("w.safetensors")).unwrap();
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_download_that_fails_says_why_and_leaves_what_was_there() {
    let bytes = published_bytes();
    let id = blob_id(&bytes);
    let folder = folder("failing");
    let dest = folder.join("w.safetensors");
    fs::write(&dest, "what was there").unwrap();
    let mut wrong = bytes.clone();
    wrong[700] ^= 1;
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nabc".to_vec();
    let unannounced = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", &bytes[..500]].concat();
    let rows = [
        (ok(bytes.len(), &bytes[..500]), "was interrupted after 500 bytes; try again"),
        (chunked, "was interrupted after 3 bytes; try again"),
        (unannounced, "is not the published checkpoint: 500 bytes with git blob id"),
        (ok(bytes.len(), &wrong), "is not the published checkpoint: 1038 bytes"),
        (ok(65 << 20, b""), "gives more than 67108864 bytes"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(), "status 404"),
        (b"".to_vec(), "cannot reach http://127.0.0.1:"),
        (b"SSH-2.0-x\r\n".to_vec(), "cannot reach http://127.0.0.1:"),
    ];
    for (answer, expected) in rows {
        let error = fetch_from(&[answer], &id, &dest).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(files(&folder), ["w.safetensors"], "{expected}");
        assert_eq!(fs::read(&dest).unwrap(), b"what was there", "{expected}");
    }
    let published = Published { url: "http://127.0.0.1:1/w.pth", blob_id: &id };
    let error = fetch(published, &dest, &ProgressBar::hidden(), &|_| Ok(())).unwrap_err();
    assert!(matches!(error, FetchError::Connect { .. }), "{error}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_callers_own_refusal_stops_the_file_from_being_written() {
    let folder = folder("refusing");
    let dest = folder.join("w.safetensors");
    let source = folder.join("source.pth");
    fs::write(&source, published_bytes()).unwrap();
    let refuse = |_: &mut Checkpoint| Err("it does not fit".into());
    let error = import(&source, &dest, "0", Some("mine"), &refuse).unwrap_err();
    assert!(matches!(error, FetchError::Refused { .. }), "{error}");
    assert_eq!(files(&folder), ["source.pth"]);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn import_takes_the_published_file_as_such_and_another_only_by_name() {
    let (bytes, folder) = (published_bytes(), folder("import"));
    let (source, dest) = (folder.join("source.pth"), folder.join("w.safetensors"));
    fs::write(&source, &bytes).unwrap();
    let id = blob_id(&bytes);
    let origin = |checkpoint: Checkpoint| checkpoint.metadata.provenance["origin"].clone();
    assert_eq!(origin(import(&source, &dest, &id, None, &|_| Ok(())).unwrap()), "published");
    let error = import(&source, &dest, BLOB_ID, None, &|_| Ok(())).unwrap_err();
    assert!(matches!(error, FetchError::WrongBytes { .. }), "{error}");
    let other = import(&source, &dest, BLOB_ID, Some("birds"), &|_| Ok(())).unwrap();
    assert_eq!(other.metadata.provenance["name"], "birds");
    assert_eq!(other.metadata.provenance["source"], "source.pth");
    assert_eq!(origin(other), "other");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn two_processes_cannot_write_the_same_file_at_once() {
    let folder = folder("twice");
    let first = Atomic::create(&folder.join("x")).unwrap();
    let error = Atomic::create(&folder.join("x")).unwrap_err();
    assert!(error.to_string().contains("another process"), "{error}");
    first.commit().unwrap();
    drop(Atomic::create(&folder.join("x")).unwrap());
    assert_eq!(files(&folder), ["x"]);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_blob_id_is_that_of_git() {
    assert_eq!(blob_id(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
    assert_eq!(blob_id(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
}

fn child(name: &str) -> String {
    format!("{}::{name}", module_path!().split_once("::").unwrap().1)
}

#[test]
#[ignore = "the next test starts it"]
fn no_space_child() {
    let folder = PathBuf::from(std::env::var_os("GHOSTWATCH_TEST_FOLDER").unwrap());
    // A file of a megabyte on a disk of 64 KiB: it fails in the download, and in the conversion.
    let big = vec![0; 1 << 20];
    let dest = folder.join("w.safetensors");
    let error = fetch_from(&[ok(big.len(), &big)], &blob_id(&big), &dest).unwrap_err();
    assert!(error.to_string().contains("(no space is left"), "{error}");
    let mut checkpoint = weights::parse(&published_bytes(), false).unwrap();
    let tensor = checkpoint.tensors.get_mut("conv.weight").unwrap();
    *tensor = weights::Tensor { shape: vec![1 << 18], data: vec![0.0; 1 << 18] };
    let error = weights::write(&dest, &checkpoint).unwrap_err();
    let WeightsError::Io { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    assert!(files(&folder).is_empty());
}

#[test]
fn a_full_disk_is_named_and_nothing_is_left_on_it() {
    let folder = folder("full");
    // A disk of its own in a mount namespace, which is gone with the child.
    let script = r#"mount -t tmpfs -o size=64k none "$GHOSTWATCH_TEST_FOLDER" && exec "$0" "$@""#;
    let child = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &child("no_space_child"), "--ignored"])
        .env("GHOSTWATCH_TEST_FOLDER", &folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stderr));
    assert!(said.contains("1 passed"), "{said}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
#[ignore = "the next test starts it"]
fn proxy_child() {
    let dest = PathBuf::from(std::env::var_os("GHOSTWATCH_TEST_FOLDER").unwrap()).join("w");
    let id = blob_id(&published_bytes());
    let published = Published { url: "http://weights.invalid/w.pth", blob_id: &id };
    fetch(published, &dest, &ProgressBar::hidden(), &|_| Ok(())).unwrap();
}

#[test]
fn the_proxy_of_the_environment_is_used() {
    let (bytes, folder) = (published_bytes(), folder("proxy"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let first = request(&stream);
            if first.starts_with("CONNECT ") {
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
                request(&stream);
            }
            stream.write_all(&ok(bytes.len(), &bytes)).unwrap();
            first
        });
        let mut command = Command::new(std::env::current_exe().unwrap());
        for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        let child = command
            .args(["--exact", &child("proxy_child"), "--ignored"])
            .env("GHOSTWATCH_TEST_FOLDER", &folder)
            .env("HTTP_PROXY", &proxy)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stderr));
        assert!(said.contains("1 passed"), "{said}");
        assert!(server.join().unwrap().contains("weights.invalid"));
    });
    fs::remove_dir_all(folder).unwrap();
}
