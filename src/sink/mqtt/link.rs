//! One connection: a task that turns the client library's event loop, so that pings go out while
//! nobody waits for an acknowledgement, and what it tells.

use std::{
    collections::VecDeque,
    error::Error,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::anyhow;
use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, Event, EventLoop, Incoming, MqttOptions,
    NetworkOptions, Outgoing, Packet, QoS, StateError,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use crate::sink::{
    broker::{Code, Fault},
    settings::Mqtt as Settings,
};

/// Steps of a connection.
#[derive(Debug, PartialEq)]
pub(super) enum Told {
    /// The broker has let us in.
    Connected,
    /// The next publication, in order, goes out with this identifier.
    Sent(u16),
    /// The publication with this identifier is acknowledged.
    Acked(u16),
}

type Step = Result<Told, ConnectionError>;

/// Dropping it ends the connection without a good-bye and forgets what was in flight.
pub(super) struct Link {
    client: AsyncClient,
    steps: mpsc::Receiver<Step>,
    /// Received together, because one wake-up for each is slow; not looked at yet.
    ahead: VecDeque<Step>,
    batch: Vec<Step>,
    /// Whether acknowledgements are waited for and nothing else is to be sent meanwhile.
    idle: Arc<AtomicBool>,
    task: JoinSet<()>,
}

impl Link {
    pub(super) fn start(options: MqttOptions, settings: &Settings) -> Link {
        // A window of publications, one label for the last of them and a good-bye never wait.
        let room = usize::from(settings.max_inflight) + 2;
        let (client, mut event_loop) = AsyncClient::new(options, room);
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        // Not only for connecting: also how long a full socket may take to become writable.
        network.set_connection_timeout(settings.ack_timeout.as_secs().max(1));
        event_loop.set_network_options(network);
        let (to, steps) = mpsc::channel(2 * room);
        let idle = Arc::new(AtomicBool::new(false));
        let mut task = JoinSet::new();
        task.spawn(turn(event_loop, to, idle.clone(), settings.ack_timeout));
        Link { client, steps, ahead: VecDeque::new(), batch: Vec::new(), idle, task }
    }

    /// Says whether acknowledgements are waited for and nothing else is to be sent meanwhile.
    pub(super) fn idle(&self, idle: bool) {
        self.idle.store(idle, Relaxed);
    }

    /// Hands a publication to the task; never waits.
    pub(super) fn publish(
        &self,
        topic: String,
        retain: bool,
        payload: impl Into<Vec<u8>>,
    ) -> Result<(), Fault> {
        let sent = self.client.try_publish(topic, QoS::AtLeastOnce, retain, payload);
        sent.map_err(|it| Fault::new(Code::Error, anyhow!("handing over a publication: {it}")))
    }

    /// The next step.
    pub(super) async fn next(&mut self, deadline: Instant) -> Result<Told, Fault> {
        if self.ahead.is_empty() {
            let received = self.steps.recv_many(&mut self.batch, 64);
            let count = timeout_at(deadline, received).await.map_err(|_| {
                Fault::new(Code::Timeout, anyhow!("the broker has not answered in time"))
            })?;
            if count == 0 {
                return Err(lost_link());
            }
            self.ahead.extend(self.batch.drain(..));
        }
        self.ahead.pop_front().expect("at least one was received").map_err(fault)
    }

    /// Returns when the connection is lost. Nothing is in flight, so nothing else is told.
    pub(super) async fn lost(&mut self) -> Fault {
        loop {
            let step = match self.ahead.pop_front() {
                Some(it) => Some(it),
                None => self.steps.recv().await,
            };
            match step {
                Some(Ok(_)) => (),
                Some(Err(it)) => return fault(it),
                None => return lost_link(),
            }
        }
    }

    /// Says good-bye, so that the broker throws the last will away.
    pub(super) async fn end(mut self, deadline: Instant) {
        if self.client.try_disconnect().is_ok() {
            // Past the deadline the connection is cut instead.
            timeout_at(deadline, self.task.join_next()).await.ok();
        }
    }
}

/// Nudges in a row after which a broker is left to its own pace until it acknowledges something.
const NUDGES_MAX: u32 = 8;

/// Sends two bytes, so that the system acknowledges what it has received with them.
///
/// Mosquitto leaves Nagle's algorithm on: it sends no small packet while an earlier one is not
/// acknowledged, and our system acknowledges 40 ms later if there is nothing to send. So the end of
/// every part would take 40 ms longer. The library sends pings of its own only to see whether the
/// broker lives, and would take a second one before the answer for its death.
async fn nudge(event_loop: &mut EventLoop, most: Duration) -> Result<(), ConnectionError> {
    let Some(network) = &mut event_loop.network else { return Ok(()) };
    let send = async {
        network.write(Packet::PingReq).await?;
        network.flush().await
    };
    Ok(timeout(most, send).await.map_err(|_| ConnectionError::FlushTimeout)??)
}

/// Whether all that was received is told, and acknowledgements are still to come.
fn waits(event_loop: &EventLoop) -> bool {
    event_loop.state.events.is_empty() && 0 < event_loop.state.inflight()
}

async fn turn(
    mut event_loop: EventLoop,
    to: mpsc::Sender<Step>,
    idle: Arc<AtomicBool>,
    most: Duration,
) {
    // A publication whose identifier is still taken waits until that is acknowledged, and is
    // announced twice.
    let mut waiting = None;
    // Since the last acknowledgement.
    let mut nudges = 0;
    loop {
        let step = match event_loop.poll().await {
            Ok(Event::Incoming(Incoming::ConnAck(_))) => Ok(Told::Connected),
            Ok(Event::Incoming(Incoming::PubAck(ack))) => {
                nudges = 0;
                let nudged = if idle.load(Relaxed) && waits(&event_loop) {
                    nudge(&mut event_loop, most).await
                } else {
                    Ok(())
                };
                nudged.map(|()| Told::Acked(ack.pkid))
            }
            // The answer to a nudge holds up what comes after it, as any small packet does. A broker
            // that answers but does not acknowledge is not asked without end.
            Ok(Event::Incoming(Incoming::PingResp))
                if nudges < NUDGES_MAX && idle.load(Relaxed) && waits(&event_loop) =>
            {
                nudges += 1;
                match nudge(&mut event_loop, most).await {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                }
            }
            Ok(Event::Outgoing(Outgoing::AwaitAck(id))) => {
                waiting = Some(id);
                Ok(Told::Sent(id))
            }
            Ok(Event::Outgoing(Outgoing::Publish(id))) if waiting == Some(id) => {
                waiting = None;
                continue;
            }
            Ok(Event::Outgoing(Outgoing::Publish(id))) => Ok(Told::Sent(id)),
            Ok(Event::Outgoing(Outgoing::Disconnect)) => return,
            Ok(_) => continue,
            Err(error) => Err(error),
        };
        // The library would connect anew and go on where it was; that is ours to decide.
        let over = step.is_err();
        if to.send(step).await.is_err() || over {
            return;
        }
    }
}

/// The fault of using a connection that is not there any more.
pub(super) fn lost_link() -> Fault {
    Fault::new(Code::Error, anyhow!("the connection is closed"))
}

fn fault(error: ConnectionError) -> Fault {
    let code = match &error {
        ConnectionError::NetworkTimeout | ConnectionError::FlushTimeout => Code::Timeout,
        ConnectionError::MqttState(StateError::AwaitPingResp | StateError::CollisionTimeout) => {
            Code::Timeout
        }
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => Code::Auth,
        ConnectionError::Tls(_) => Code::Tls,
        it => code_of_chain(it),
    };
    Fault::new(code, error)
}

/// The library wraps errors of the socket differently before, at and after the handshakes.
fn code_of_chain(error: &(dyn Error + 'static)) -> Code {
    let mut cause = Some(error);
    while let Some(it) = cause {
        if let Some(it) = it.downcast_ref::<io::Error>() {
            return code_of_io(it);
        }
        cause = it.source();
    }
    Code::Error
}

fn code_of_io(error: &io::Error) -> Code {
    if error.get_ref().is_some_and(|it| it.is::<rustls::Error>()) {
        return Code::Tls;
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Code::Refused,
        io::ErrorKind::TimedOut
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable => Code::Timeout,
        _ => Code::Error,
    }
}
