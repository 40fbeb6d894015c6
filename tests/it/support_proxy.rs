//! A TCP proxy of ours that does to a camera's connection what networks and cameras do.

use std::{
    io::{self, BufRead as _, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{Builder, JoinHandle, sleep},
    time::Duration,
};

use crate::support::wait_until;

/// How bytes are handed on, on old and new connections alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    /// As they come.
    Pass,
    /// Not at all, in either direction; the connections stay, and new ones are taken and never
    /// answered. What was sent meanwhile comes when it is over, as TCP has it.
    Silent,
    /// So many bytes a second from the server.
    Slow(u32),
    /// The RTP packets that the server sends inside the connection suffer this.
    Damage(Damage),
}

/// What happens to RTP packets, by chance, but the same for the same seed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Damage {
    pub(crate) seed: u64,
    /// Share of packets that never come, 0..1.
    pub(crate) loss: f64,
    /// Share of packets that come twice.
    pub(crate) duplicate: f64,
    /// Share of packets that come after the one behind them.
    pub(crate) reorder: f64,
    /// Share of packets that come with one bit of their payload flipped.
    pub(crate) flip: f64,
    /// Longest wait before a packet, which holds up those behind it.
    pub(crate) delay: Duration,
}

/// What was done to RTP packets.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) packets: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) duplicated: AtomicU64,
    pub(crate) reordered: AtomicU64,
    pub(crate) flipped: AtomicU64,
}

/// Runs until it is dropped.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: Mutex<Option<Accepting>>,
}

struct Accepting {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

struct Shared {
    server: u16,
    mode: Mutex<Mode>,
    changed: Condvar,
    open: Mutex<Vec<Pair>>,
    accepted: AtomicU64,
    done: Done,
}

/// Both ends of one connection.
#[derive(Clone)]
struct Pair {
    client: Arc<TcpStream>,
    server: Arc<TcpStream>,
    gone: Arc<AtomicBool>,
}

impl Proxy {
    /// One in front of this port of the loopback interface.
    pub(crate) fn start(server: u16) -> Proxy {
        let shared = Arc::new(Shared {
            server,
            mode: Mutex::new(Mode::Pass),
            changed: Condvar::new(),
            open: Mutex::default(),
            accepted: AtomicU64::new(0),
            done: Done::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepting = Mutex::new(Some(accept(listener, shared.clone())));
        Proxy { port, shared, accepting }
    }

    /// The URL of the server's stream, through the proxy.
    pub(crate) fn url(&self) -> String {
        format!("rtsp://127.0.0.1:{}/stream", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Connections taken so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.shared.accepted.load(SeqCst)
    }

    /// What was done to RTP packets so far.
    pub(crate) fn done(&self) -> &Done {
        &self.shared.done
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.shared.mode() = mode;
        self.shared.changed.notify_all();
    }

    /// Resets every connection: RST to both sides.
    pub(crate) fn cut(&self) {
        for pair in self.shared.take() {
            for end in [&pair.client, &pair.server] {
                // The other side may have been faster.
                rustix::net::connect_unspec(end).ok();
            }
        }
    }

    /// Ends every connection in order: FIN to both sides.
    pub(crate) fn finish(&self) {
        self.shared.take().iter().for_each(Pair::shut_down);
    }

    /// Listens no more: new connections are refused. Old ones stay.
    pub(crate) fn refuse(&self) {
        let Some(accepting) = self.accepting.lock().unwrap().take() else { return };
        accepting.stop.store(true, SeqCst);
        // Wakes the thread up, which closes the listener.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        accepting.thread.join().unwrap();
    }

    /// Listens again, on the same port.
    pub(crate) fn accept(&self) {
        let mut accepting = self.accepting.lock().unwrap();
        if accepting.is_none() {
            let listener = TcpListener::bind(("127.0.0.1", self.port)).unwrap();
            *accepting = Some(accept(listener, self.shared.clone()));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse();
        self.set(Mode::Pass);
        self.cut();
    }
}

impl Pair {
    fn shut_down(&self) {
        self.gone.store(true, SeqCst);
        for end in [&self.client, &self.server] {
            // The other side may have been faster.
            end.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Shared {
    fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap()
    }

    /// Takes out all connections; their threads end without handing on any more.
    fn take(&self) -> Vec<Pair> {
        let open = std::mem::take(&mut *self.open.lock().unwrap());
        open.iter().for_each(|it| it.gone.store(true, SeqCst));
        self.changed.notify_all();
        open
    }

    /// The mode, once it lets something through.
    fn wait(&self, pair: &Pair) -> io::Result<Mode> {
        let silent = |it: &mut Mode| *it == Mode::Silent && !pair.gone.load(SeqCst);
        let limit = Duration::from_millis(100);
        loop {
            // A limit, as `gone` is set without the lock.
            let (mode, waited) =
                self.changed.wait_timeout_while(self.mode(), limit, silent).unwrap();
            if pair.gone.load(SeqCst) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if !waited.timed_out() {
                return Ok(*mode);
            }
        }
    }
}

fn accept(listener: TcpListener, shared: Arc<Shared>) -> Accepting {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = apart(move || {
        for client in listener.incoming() {
            if stopped.load(SeqCst) {
                return;
            }
            // A client, or the server, may be gone by now.
            let Ok(client) = client else { continue };
            let Ok(server) = TcpStream::connect(("127.0.0.1", shared.server)) else { continue };
            client.set_nodelay(true).ok();
            let gone = Arc::default();
            let pair = Pair { client: Arc::new(client), server: Arc::new(server), gone };
            shared.open.lock().unwrap().push(pair.clone());
            shared.accepted.fetch_add(1, SeqCst);
            let (there, back) = ((shared.clone(), pair.clone()), (shared.clone(), pair));
            apart(move || end(&there.1, there.0.requests(&there.1)));
            apart(move || end(&back.1, back.0.answers(&back.1)));
        }
    });
    Accepting { stop, thread }
}

/// One direction has ended, and so the connection.
fn end(pair: &Pair, result: io::Result<()>) {
    if result.is_ok() || !pair.gone.load(SeqCst) {
        pair.shut_down();
    }
}

impl Shared {
    fn requests(&self, pair: &Pair) -> io::Result<()> {
        let mut chunk = [0; 4096];
        loop {
            let n = (&*pair.client).read(&mut chunk)?;
            if n == 0 {
                return Ok(());
            }
            self.wait(pair)?;
            (&*pair.server).write_all(&chunk[..n])?;
        }
    }

    /// RTSP messages and RTP packets, each handed on as a whole where nothing else is asked for.
    fn answers(&self, pair: &Pair) -> io::Result<()> {
        let mut server = BufReader::new(&*pair.server);
        let mut random = None;
        let mut held: Option<Vec<u8>> = None;
        loop {
            let mut unit = unit(&mut server)?;
            let mode = self.wait(pair)?;
            let Mode::Damage(damage) = mode else {
                for unit in held.take().into_iter().chain([unit]) {
                    self.send(pair, &unit, mode)?;
                }
                continue;
            };
            // Odd channels are RTCP.
            if unit[0] != b'$' || unit[1] % 2 == 1 {
                self.send(pair, &unit, mode)?;
                continue;
            }
            let random = random.get_or_insert(Random(damage.seed));
            self.done.packets.fetch_add(1, SeqCst);
            if random.next() < damage.loss {
                self.done.lost.fetch_add(1, SeqCst);
                continue;
            }
            // The header of the channel has four bytes, that of RTP twelve.
            let payload = unit.len().saturating_sub(16);
            if 0 < payload && random.next() < damage.flip {
                self.done.flipped.fetch_add(1, SeqCst);
                let bit = (random.next() * 8.0) as u32;
                unit[16 + (random.next() * payload as f64) as usize] ^= 1 << bit;
            }
            sleep(damage.delay.mul_f64(random.next()));
            if held.is_none() && random.next() < damage.reorder {
                self.done.reordered.fetch_add(1, SeqCst);
                held = Some(unit);
                continue;
            }
            self.send(pair, &unit, mode)?;
            if random.next() < damage.duplicate {
                self.done.duplicated.fetch_add(1, SeqCst);
                self.send(pair, &unit, mode)?;
            }
            if let Some(late) = held.take() {
                self.send(pair, &late, mode)?;
            }
        }
    }

    fn send(&self, pair: &Pair, unit: &[u8], mode: Mode) -> io::Result<()> {
        let Mode::Slow(rate) = mode else { return (&*pair.client).write_all(unit) };
        for byte in unit.chunks(1) {
            let Mode::Slow(_) = self.wait(pair)? else {
                // The pace was changed in the middle: the rest at once.
                (&*pair.client).write_all(byte)?;
                continue;
            };
            // This is the pace of the line, not waiting for something to happen.
            sleep(Duration::from_secs(1) / rate);
            (&*pair.client).write_all(byte)?;
        }
        Ok(())
    }
}

/// One packet with its header of four bytes, or one message with its body.
fn unit(server: &mut BufReader<&TcpStream>) -> io::Result<Vec<u8>> {
    let mut unit = vec![0];
    server.read_exact(&mut unit)?;
    if unit[0] == b'$' {
        unit.resize(4, 0);
        server.read_exact(&mut unit[1..])?;
        let length = usize::from(u16::from_be_bytes([unit[2], unit[3]]));
        unit.resize(4 + length, 0);
        server.read_exact(&mut unit[4..])?;
        return Ok(unit);
    }
    let mut body = 0;
    loop {
        let start = unit.len();
        if server.read_until(b'\n', &mut unit)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = String::from_utf8_lossy(&unit[start..]).to_ascii_lowercase();
        if let Some(length) = line.strip_prefix("content-length:") {
            body = length.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let head = unit.len();
    unit.resize(head + body, 0);
    server.read_exact(&mut unit[head..])?;
    Ok(unit)
}

/// SplitMix64, so that a run can be had again.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// In 0.0..1.0.
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Ends with the connections that it serves, at the latest with the test's process.
fn apart(body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    Builder::new().name("proxy".into()).spawn(body).unwrap()
}

/// A server that sends `what` on each connection and then nothing more.
fn sends(what: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    apart(move || {
        let mut open = Vec::new();
        for client in listener.incoming() {
            let mut client = client.unwrap();
            if client.write_all(what).is_ok() {
                open.push(client);
            }
        }
    });
    port
}

const PACKETS: &[u8] =
    b"RTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab$\0\0\x01A$\0\0\x01B$\x01\0\x01C";
const HEAD: usize = 40;

fn connected(proxy: &Proxy) -> TcpStream {
    let client = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client
}

#[test]
fn bytes_pass_as_they_are_and_connections_end_as_asked() {
    let proxy = Proxy::start(sends(PACKETS));
    let all = |mut client: &TcpStream| {
        let mut got = vec![0; PACKETS.len()];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, PACKETS);
    };
    let client = connected(&proxy);
    all(&client);
    proxy.cut();
    let error = (&client).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let client = connected(&proxy);
    all(&client);
    proxy.finish();
    assert_eq!((&client).read(&mut [0]).unwrap(), 0);
    assert_eq!(proxy.accepted(), 2);
    proxy.refuse();
    let error = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    proxy.accept();
    all(&connected(&proxy));
}

#[test]
fn silence_holds_everything_and_slowness_each_byte() {
    let proxy = Proxy::start(sends(PACKETS));
    proxy.set(Mode::Silent);
    let mut client = connected(&proxy);
    wait_until("the proxy has taken it", || proxy.accepted() == 1);
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    let started = std::time::Instant::now();
    proxy.set(Mode::Slow(100));
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    assert!(Duration::from_millis(100) <= started.elapsed());
    proxy.set(Mode::Pass);
    let mut rest = vec![0; PACKETS.len() - 10];
    client.read_exact(&mut rest).unwrap();
    assert_eq!(rest, PACKETS[10..]);
}

#[test]
fn packets_are_lost_doubled_and_swapped_but_never_messages_and_reports() {
    let proxy = Proxy::start(sends(PACKETS));
    let run = |damage: Damage, expected: &[u8]| {
        proxy.set(Mode::Damage(damage));
        let mut got = vec![0; HEAD + expected.len()];
        connected(&proxy).read_exact(&mut got).unwrap();
        assert_eq!(got[..HEAD], PACKETS[..HEAD], "{damage:?}");
        assert_eq!(got[HEAD..], *expected, "{damage:?}");
    };
    let none = Damage::default();
    run(Damage { loss: 1.0, ..none }, b"$\x01\0\x01C");
    run(Damage { duplicate: 1.0, ..none }, b"$\0\0\x01A$\0\0\x01A$\0\0\x01B$\0\0\x01B$\x01\0\x01C");
    run(Damage { flip: 1.0, ..none }, b"$\0\0\x01A$\0\0\x01B$\x01\0\x01C");
    run(Damage { reorder: 1.0, ..none }, b"$\0\0\x01B$\0\0\x01A$\x01\0\x01C");
    let done = proxy.done();
    assert_eq!(done.packets.load(SeqCst), 8);
    assert_eq!(done.lost.load(SeqCst), 2);
    assert_eq!((done.duplicated.load(SeqCst), done.reordered.load(SeqCst)), (2, 1));
    assert_eq!(done.flipped.load(SeqCst), 0, "these packets have no payload");
}
