//! A connection in between that loses acknowledgements and nothing else.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
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
