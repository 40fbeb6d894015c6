//! A door in front of a Kafka broker: it asks for a login and lets nobody else through.
//!
//! Tansu knows SCRAM, but keeps no users where it keeps everything in memory. So the door speaks
//! that part of Kafka's protocol as Apache Kafka does: `SaslHandshake` and `SaslAuthenticate`
//! (KIP-43, KIP-152) with PLAIN (RFC 4616) and SCRAM (RFC 5802, RFC 7677). What comes after the
//! login is the broker's, byte for byte, and the broker tells its clients the door's address.

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::{Builder, JoinHandle},
};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use ring::{digest, hmac, pbkdf2};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    kafka::tansu_at,
    support_broker::{self, free_port},
};

const SASL_HANDSHAKE: i16 = 17;
const API_VERSIONS: i16 = 18;
const SASL_AUTHENTICATE: i16 = 36;
/// Kafka's error numbers.
const UNSUPPORTED_SASL_MECHANISM: i16 = 33;
const SASL_AUTHENTICATION_FAILED: i16 = 58;
/// The least that Apache Kafka allows.
const ITERATIONS: u32 = 4096;
const SALT: &[u8] = b"every user's salt";

/// Whom the door lets in, and how they may show it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Login {
    pub(crate) mechanisms: &'static [&'static str],
    pub(crate) user: &'static str,
    pub(crate) password: &'static str,
}

/// A broker behind a door. Both end when it is dropped.
pub(crate) struct Door {
    pub(crate) port: u16,
    seen: Arc<Seen>,
    thread: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    _broker: support_broker::Server,
}

#[derive(Debug, Default)]
struct Seen {
    let_in: AtomicU64,
    refused: AtomicU64,
}

/// What each connection is judged by.
struct Rules {
    login: Login,
    broker: u16,
    tls: Option<TlsAcceptor>,
    seen: Arc<Seen>,
}

impl Door {
    /// Starts Tansu and the door; with TLS if `folder` has `server.pem` and `server.key`.
    pub(crate) fn start(folder: &TempDir, login: Login) -> Door {
        let (port, behind) = (free_port(), free_port());
        let broker = tansu_at(folder, behind, port, &[]);
        let seen = Arc::new(Seen::default());
        let tls = acceptor(folder.path());
        let rules = Arc::new(Rules { login, broker: behind, tls, seen: seen.clone() });
        let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        let (stop, stopped) = oneshot::channel();
        let run = move || run(listener, &rules, stopped);
        let thread = Builder::new().name("door".into()).spawn(run).unwrap();
        Door { port, seen, thread: Some((stop, thread)), _broker: broker }
    }

    /// Connections that showed the right password.
    pub(crate) fn let_in(&self) -> u64 {
        self.seen.let_in.load(SeqCst)
    }

    /// Connections that tried to log in and were refused.
    pub(crate) fn refused(&self) -> u64 {
        self.seen.refused.load(SeqCst)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok(), "the door broke");
        }
    }
}

fn acceptor(folder: &Path) -> Option<TlsAcceptor> {
    let chain = fs::read(folder.join("server.pem")).ok()?;
    let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    Some(TlsAcceptor::from(Arc::new(config)))
}

fn run(listener: std::net::TcpListener, rules: &Arc<Rules>, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let accept = async {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let rules = rules.clone();
                // A connection that breaks is the client's to notice.
                tokio::spawn(async move { serve(client, &rules).await.ok() });
            }
        };
        tokio::select! {
            () = accept => (),
            _ = stopped => (),
        }
    });
}

async fn serve(client: TcpStream, rules: &Rules) -> io::Result<()> {
    match &rules.tls {
        None => pass(client, rules).await,
        Some(tls) => pass(tls.accept(client).await?, rules).await,
    }
}

async fn pass(mut client: impl AsyncRead + AsyncWrite + Unpin, rules: &Rules) -> io::Result<()> {
    let mut broker = TcpStream::connect(("127.0.0.1", rules.broker)).await?;
    if log_in(&mut client, &mut broker, rules).await? {
        rules.seen.let_in.fetch_add(1, SeqCst);
        copy_bidirectional(&mut client, &mut broker).await?;
        return Ok(());
    }
    rules.seen.refused.fetch_add(1, SeqCst);
    client.shutdown().await
}

/// Whether the client has shown who it is. It hears why not, if it asked as the protocol says.
async fn log_in(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    broker: &mut TcpStream,
    rules: &Rules,
) -> io::Result<bool> {
    let mut talk: Option<Talk> = None;
    loop {
        let frame = read_frame(client).await?;
        let request = Request::of(&frame);
        match (request.key, &mut talk) {
            (API_VERSIONS, None) => {
                write_frame(broker, &frame).await?;
                let answer = read_frame(broker).await?;
                write_frame(client, &answer).await?;
            }
            (SASL_HANDSHAKE, None) => {
                let known = rules.login.mechanisms.iter().find(|it| it.as_bytes() == request.body);
                let error = if known.is_some() { 0 } else { UNSUPPORTED_SASL_MECHANISM };
                let mut answer = Answer::to(&request).number16(error);
                answer = answer.number32(rules.login.mechanisms.len() as i32);
                for it in rules.login.mechanisms {
                    answer = answer.text(it);
                }
                write_frame(client, &answer.0).await?;
                let Some(known) = known else { return Ok(false) };
                talk = Some(Talk::new(known, rules.login));
            }
            (SASL_AUTHENTICATE, Some(talk)) => {
                let said = talk.answer(request.body);
                let error = if said.is_some() { 0 } else { SASL_AUTHENTICATION_FAILED };
                let mut answer = Answer::to(&request).number16(error);
                answer = match &said {
                    Some(bytes) => answer.number16(-1).bytes(bytes),
                    None => answer.text("Authentication failed: Invalid credentials").bytes(b""),
                };
                if request.version == 1 {
                    // The login lasts as long as the connection.
                    answer.0.extend(0_i64.to_be_bytes());
                }
                write_frame(client, &answer.0).await?;
                match (said, talk.is_done) {
                    (Some(_), false) => (),
                    (said, _) => return Ok(said.is_some()),
                }
            }
            // Apache Kafka hangs up on who asks anything else before the login.
            _ => return Ok(false),
        }
    }
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let size = from.read_i32().await?;
    let size = usize::try_from(size).map_err(io::Error::other)?;
    assert!(size < 1 << 20, "no request before a login is so large: {size}");
    let mut frame = vec![0; size];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

async fn write_frame(to: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    to.write_all(&[&(frame.len() as i32).to_be_bytes(), frame].concat()).await?;
    to.flush().await
}

/// One request: what it asks, and what follows its header without the length before.
struct Request<'a> {
    key: i16,
    version: i16,
    correlation: [u8; 4],
    body: &'a [u8],
}

impl Request<'_> {
    fn of(frame: &[u8]) -> Request<'_> {
        let number = |at: usize| i16::from_be_bytes(frame[at..at + 2].try_into().unwrap());
        let (key, version) = (number(0), number(2));
        let body = &frame[10 + number(8).max(0) as usize..];
        let body = match key {
            SASL_HANDSHAKE => &body[2..],
            SASL_AUTHENTICATE => {
                assert!(version < 2, "version {version} is written in another way");
                &body[4..]
            }
            _ => body,
        };
        Request { key, version, correlation: frame[4..8].try_into().unwrap(), body }
    }
}

struct Answer(Vec<u8>);

impl Answer {
    fn to(request: &Request<'_>) -> Answer {
        Answer(request.correlation.to_vec())
    }

    fn number16(mut self, it: i16) -> Answer {
        self.0.extend(it.to_be_bytes());
        self
    }

    fn number32(mut self, it: i32) -> Answer {
        self.0.extend(it.to_be_bytes());
        self
    }

    fn text(self, it: &str) -> Answer {
        let mut answer = self.number16(it.len() as i16);
        answer.0.extend(it.as_bytes());
        answer
    }

    fn bytes(self, it: &[u8]) -> Answer {
        let mut answer = self.number32(it.len() as i32);
        answer.0.extend(it);
        answer
    }
}

/// The server's side of a SASL mechanism.
struct Talk {
    login: Login,
    /// `None` iff it is PLAIN.
    scram: Option<Scram>,
    /// The first message of SCRAM without its header, and what was answered; empty before.
    before: (String, String),
    is_done: bool,
}

/// The functions of one SCRAM mechanism.
#[derive(Clone, Copy)]
struct Scram {
    pbkdf2: pbkdf2::Algorithm,
    hmac: hmac::Algorithm,
    hash: &'static digest::Algorithm,
}

impl Talk {
    fn new(mechanism: &str, login: Login) -> Talk {
        let scram = match mechanism {
            "PLAIN" => None,
            "SCRAM-SHA-256" => Some(Scram {
                pbkdf2: pbkdf2::PBKDF2_HMAC_SHA256,
                hmac: hmac::HMAC_SHA256,
                hash: &digest::SHA256,
            }),
            "SCRAM-SHA-512" => Some(Scram {
                pbkdf2: pbkdf2::PBKDF2_HMAC_SHA512,
                hmac: hmac::HMAC_SHA512,
                hash: &digest::SHA512,
            }),
            other => panic!("no such mechanism: {other}"),
        };
        Talk { login, scram, before: Default::default(), is_done: false }
    }

    /// What is answered; `None` iff the client is refused.
    fn answer(&mut self, said: &[u8]) -> Option<Vec<u8>> {
        let said = str::from_utf8(said).ok()?;
        match self.scram {
            None => {
                self.is_done = true;
                let right = format!("\0{}\0{}", self.login.user, self.login.password);
                // The first part, on whose behalf, is empty or the user.
                let is_right = said == right || said == format!("{}{right}", self.login.user);
                is_right.then(Vec::new)
            }
            Some(_) if self.before.0.is_empty() => self.first(said),
            Some(scram) => {
                self.is_done = true;
                self.last(scram, said)
            }
        }
    }

    /// Who it is; gets the salt.
    fn first(&mut self, said: &str) -> Option<Vec<u8>> {
        // No channel binding, on nobody else's behalf.
        let bare = said.strip_prefix("n,,")?;
        let (user, nonce) = bare.strip_prefix("n=")?.split_once(",r=")?;
        if user.replace("=2C", ",").replace("=3D", "=") != self.login.user || nonce.is_empty() {
            return None;
        }
        let salt = BASE64_STANDARD.encode(SALT);
        let answer = format!("r={nonce}and-the-door's,s={salt},i={ITERATIONS}");
        self.before = (bare.to_owned(), answer.clone());
        Some(answer.into_bytes())
    }

    /// The proof that it knows the password; gets the proof that the door does.
    fn last(&self, scram: Scram, said: &str) -> Option<Vec<u8>> {
        let (without, proof) = said.split_once(",p=")?;
        let nonce = self.before.1.split(',').next()?;
        // "biws" is "n,," in base64.
        if without != format!("c=biws,{nonce}") {
            return None;
        }
        let mut salted = vec![0; scram.hash.output_len()];
        let iterations = ITERATIONS.try_into().unwrap();
        pbkdf2::derive(scram.pbkdf2, iterations, SALT, self.login.password.as_bytes(), &mut salted);
        let sign = |key: &[u8], text: &str| {
            hmac::sign(&hmac::Key::new(scram.hmac, key), text.as_bytes()).as_ref().to_vec()
        };
        let text = format!("{},{},{without}", self.before.0, self.before.1);
        let client_key = sign(&salted, "Client Key");
        let stored = digest::digest(scram.hash, &client_key);
        let signature = sign(stored.as_ref(), &text);
        let right: Vec<u8> = client_key.iter().zip(&signature).map(|it| it.0 ^ it.1).collect();
        if BASE64_STANDARD.decode(proof).ok()? != right {
            return None;
        }
        let server_key = sign(&salted, "Server Key");
        Some(format!("v={}", BASE64_STANDARD.encode(sign(&server_key, &text))).into_bytes())
    }
}
