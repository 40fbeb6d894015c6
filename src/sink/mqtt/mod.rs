//! Publishes events to an MQTT 3.1.1 broker at QoS 1: one topic per stream and class of events, a
//! retained word on whether we are there, and the retained last label of each stream.
//!
//! What an acknowledgement is worth: a PUBACK says that the broker has the event in memory.
//! Mosquitto 2.0 writes what it holds for absent subscribers to disk on SIGTERM and every
//! `autosave_interval`, so killing it in between loses acknowledged events. It also acknowledges,
//! and drops, what its access list forbids and what nobody with a session of their own has
//! subscribed to: MQTT 3.1.1 has no negative acknowledgement. Over its `message_size_limit`
//! Mosquitto 2.0.11 was seen to acknowledge and drop too, and to close the connection with other
//! settings; over `max_packet_size` it always closes. Keep `packet_bytes_max` at or under either.

mod label;
mod link;
mod window;

use std::{collections::HashMap, time::Duration};

use anyhow::anyhow;
use rumqttc::{LastWill, MqttOptions, QoS, Transport};
use tokio::time::{Instant, timeout_at};

use crate::sink::{
    broker::{Acks, Broker, Code, Fault, Message, Topic},
    mqtt::{
        label::Label,
        link::{Link, Told, lost_link},
        window::Window,
    },
    settings::{Address, Mqtt as Settings},
    tls,
};

const ONLINE: &str = "online";
const OFFLINE: &str = "offline";
/// How long a good-bye may take.
const CLOSE: Duration = Duration::from_secs(2);

/// A broker that speaks MQTT 3.1.1.
pub struct Mqtt {
    settings: Settings,
    /// `None` iff not connected.
    link: Option<Link>,
    /// The label that the broker keeps for each stream, as far as this connection knows.
    labels: HashMap<String, u32>,
    /// A delivery is going on, or was dropped in its middle.
    delivering: bool,
}

impl Mqtt {
    /// A broker that is not connected yet.
    ///
    /// # Errors
    /// [`Settings::check`] says what.
    pub fn new(settings: Settings) -> anyhow::Result<Mqtt> {
        settings.check()?;
        Ok(Mqtt { settings, link: None, labels: HashMap::new(), delivering: false })
    }

    /// After a delivery that was dropped in its middle nobody knows what the acknowledgements that
    /// still come are for. The broker then speaks our last will.
    fn forget_if_dropped(&mut self) {
        if self.delivering {
            self.link = None;
        }
    }

    fn availability(&self) -> String {
        format!("{}/available", self.settings.topic_prefix)
    }

    fn options(&self) -> Result<MqttOptions, Fault> {
        let it = &self.settings;
        let mut options = MqttOptions::new(&it.client_id, it.address.host.clone(), it.address.port);
        options.set_keep_alive(it.keep_alive);
        // We know from the journal what to send again; a session would send it behind our back.
        options.set_clean_session(true);
        options.set_inflight(it.max_inflight);
        options.set_max_packet_size(64 << 10, it.packet_bytes_max);
        options.set_last_will(LastWill::new(self.availability(), OFFLINE, QoS::AtLeastOnce, true));
        let password = it.login.token.as_ref().or(it.login.password.as_ref());
        if password.is_some() || it.login.username.is_some() {
            let user = it.login.username.clone().unwrap_or_default();
            options.set_credentials(user, password.map_or("", |it| it.expose()));
        }
        if it.address.tls {
            let config = tls::client_config(&it.tls)?;
            options.set_transport(Transport::tls_with_config(config.into()));
        }
        Ok(options)
    }

    /// Publishes one retained word and waits until it is acknowledged.
    async fn say(&mut self, word: &str, deadline: Instant) -> Result<(), Fault> {
        let topic = self.availability();
        let link = self.link.as_mut().ok_or_else(lost_link)?;
        // Or the answer to a ping could come after the good-bye: then the system resets the connection,
        // the broker may not read the good-bye, and publishes the last will.
        link.idle(false);
        link.publish(topic, true, word)?;
        loop {
            match link.next(deadline).await? {
                Told::Acked(_) => return Ok(()),
                Told::Connected | Told::Sent(_) => (),
            }
        }
    }

    async fn dial(&mut self) -> Result<(), Fault> {
        let deadline = Instant::now() + self.settings.connect_timeout;
        let Address { host, port, .. } = &self.settings.address;
        // Asked here too, because an error of the library does not tell names from connections.
        let found = timeout_at(deadline, tokio::net::lookup_host(format!("{host}:{port}"))).await;
        match found {
            Ok(Ok(_)) => (),
            Ok(Err(it)) => return Err(Fault::new(Code::Dns, it)),
            Err(_) => return Err(Fault::new(Code::Timeout, anyhow!("looking up {host}"))),
        }
        self.link = Some(Link::start(self.options()?, &self.settings));
        while self.link.as_mut().ok_or_else(lost_link)?.next(deadline).await? != Told::Connected {}
        self.say(ONLINE, deadline).await
    }

    /// Puts one message, and its label if that is new, on its way.
    fn send(&mut self, message: &Message, window: &mut Window) -> Result<(), Fault> {
        let link = self.link.as_mut().ok_or_else(lost_link)?;
        let stream = message.stream_or_none();
        let prefix = &self.settings.topic_prefix;
        let topic = format!("{prefix}/{stream}/{}", message.topic.name());
        // The longest fixed header, the length of the topic and the packet's identifier.
        let bytes = 5 + 2 + topic.len() + 2 + message.json.len();
        let most = self.settings.packet_bytes_max;
        if most < bytes {
            let what =
                anyhow!("event {} makes a packet of {bytes} bytes, more than {most}", message.id);
            return Err(Fault::new(Code::TooLarge, what));
        }
        link.publish(topic, false, message.json.as_str())?;
        window.push(true);
        if !self.settings.retain_label || message.topic != Topic::Frames {
            return Ok(());
        }
        if let Some(label) = Label::of(message)
            && self.labels.get(stream) != Some(&label.label_id)
        {
            self.labels.insert(stream.to_owned(), label.label_id);
            link.publish(format!("{prefix}/{stream}/label"), true, label.json())?;
            window.push(false);
        }
        Ok(())
    }

    async fn deliver_all(
        &mut self,
        messages: &[Message],
        acks: &mut Acks<'_>,
    ) -> Result<(), Fault> {
        let mut window = Window::default();
        let mut rest = messages.iter();
        let mut refused = None;
        let mut deadline = Instant::now() + self.settings.ack_timeout;
        loop {
            while refused.is_none() && window.len() < usize::from(self.settings.max_inflight) {
                let Some(message) = rest.next() else { break };
                match self.send(message, &mut window) {
                    Ok(()) => (),
                    Err(fault) if fault.code == Code::TooLarge => refused = Some(fault),
                    Err(fault) => return Err(fault),
                }
            }
            if window.is_empty() {
                return refused.map_or(Ok(()), Err);
            }
            let link = self.link.as_mut().ok_or_else(lost_link)?;
            link.idle(refused.is_some() || rest.len() == 0);
            match link.next(deadline).await? {
                Told::Connected => (),
                Told::Sent(id) => window.sent(id),
                Told::Acked(id) => {
                    if window.acked(id, acks) {
                        deadline = Instant::now() + self.settings.ack_timeout;
                    }
                }
            }
        }
    }
}

impl Broker for Mqtt {
    async fn connect(&mut self) -> Result<(), Fault> {
        // Everything that the library remembers of the old connection goes with it.
        self.link = None;
        self.delivering = false;
        self.labels.clear();
        let dialled = self.dial().await;
        if dialled.is_err() {
            self.link = None;
        }
        dialled
    }

    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        self.forget_if_dropped();
        self.delivering = true;
        let delivered = self.deliver_all(messages, acks).await;
        self.delivering = false;
        if delivered.as_ref().is_err_and(|it| it.code != Code::TooLarge) {
            self.link = None;
        }
        delivered
    }

    async fn lost(&mut self) -> Fault {
        let Some(link) = &mut self.link else { return lost_link() };
        let fault = link.lost().await;
        self.link = None;
        fault
    }

    async fn close(&mut self) {
        self.forget_if_dropped();
        let deadline = Instant::now() + CLOSE;
        if self.say(OFFLINE, deadline).await.is_ok()
            && let Some(link) = self.link.take()
        {
            link.end(deadline).await;
        }
        self.link = None;
    }
}
