//! A connection in between that loses acknowledgements and nothing else.

use std::{
    io::{self, Read as _, Write as _},
    net,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

const PUBACK: u8 = 0x40;

/// Runs on the runtime of whoever started it.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    /// Acknowledgements that still get through.
    left: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) async fn start(server: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let left = Arc::new(AtomicUsize::new(usize::MAX));
        let shared = left.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                let (mut from_client, to_client) = client.into_split();
                let (from_server, mut to_server) = server.into_split();
                tokio::spawn(async move {
                    // An end of either side ends the copy; the test sees what comes of it.
                    tokio::io::copy(&mut from_client, &mut to_server).await.ok();
                });
                tokio::spawn(answers(from_server, to_client, shared.clone()));
            }
        });
        Proxy { port, left }
    }

    /// From now on so many acknowledgements get through.
    pub(crate) fn swallow_after(&self, count: usize) {
        self.left.store(count, SeqCst);
    }
}

/// Lets one acknowledgement through per `pause`, on a thread of its own; gives its port.
pub(crate) fn slow(server: u16, pause: Duration) -> u16 {
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    apart(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut server = net::TcpStream::connect(("127.0.0.1", server)).unwrap();
            let (mut answers, mut to_client) =
                (server.try_clone().unwrap(), client.try_clone().unwrap());
            apart(move || drop(io::copy(&mut client, &mut server)));
            apart(move || {
                let mut header = [0; 2];
                while answers.read_exact(&mut header).is_ok() {
                    let mut packet = header.to_vec();
                    packet.resize(2 + usize::from(header[1]), 0);
                    answers.read_exact(&mut packet[2..]).unwrap();
                    if header[0] == PUBACK {
                        // This is the pace of the broker, not waiting for something to happen.
                        thread::sleep(pause);
                    }
                    if to_client.write_all(&packet).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// Everything that a broker says to a publisher is two bytes of header and at most two more.
async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, left: Arc<AtomicUsize>) {
    let mut header = [0; 2];
    while from.read_exact(&mut header).await.is_ok() {
        let mut packet = header.to_vec();
        packet.resize(2 + usize::from(header[1]), 0);
        from.read_exact(&mut packet[2..]).await.unwrap();
        let less = |it: usize| it.checked_sub(1);
        if header[0] == PUBACK && left.fetch_update(SeqCst, SeqCst, less).is_err() {
            continue;
        }
        if to.write_all(&packet).await.is_err() {
            return;
        }
    }
}

/// Ends with the test's process.
fn apart(body: impl FnOnce() + Send + 'static) {
    drop(thread::Builder::new().name("proxy".into()).spawn(body).unwrap());
}
