//! Typed values -> the sinks of the plan.

use std::time::Duration;

use crate::{
    config::{
        build::{Builder, DEFAULT, ID, is_id},
        plan::SinkPlan,
        problem::escaped,
        raw::sinks::SINK_FIELDS,
        read::{Fields, Item, Value},
    },
    secret::Secret,
    sink::{
        broker::Topic,
        nats,
        settings::{
            Address, Kafka, Login, Mechanism, Mqtt, Nats, NatsStream, Redis, Rotation, Select,
            Target, Tls, Unusable, Webhook,
        },
        webhook,
    },
};

impl Builder<'_> {
    /// The sinks, as far as they are usable.
    pub fn sinks(&mut self, root: &Fields, instance: &str) -> Vec<SinkPlan> {
        let mut sinks: Vec<SinkPlan> = Vec::new();
        for item in root.list("sinks").expect(DEFAULT) {
            let Value::Map(it) = &item.value else { continue };
            let Some(kind) = it.word("type") else { continue };
            let name = it.text("name").unwrap_or(kind).to_owned();
            if !is_id(&name) {
                self.problems.push(it.problem("name", "the name is not valid").allowed(ID));
            }
            if sinks.iter().any(|it| it.name == name) {
                let message =
                    format!("another sink is called {name} too; give each a name of its own");
                self.problems.push(it.problem("name", message));
            }
            self.belongs_to(it, kind);
            let odd = |it: char| !it.is_ascii_alphanumeric() && !"._-/".contains(it);
            if it.text("prefix").is_some_and(|it| it.contains(odd)) {
                let message = format!("{} has other characters", it.quoted("prefix"));
                let problem = it.problem("prefix", message);
                self.problems.push(problem.allowed("a-z, A-Z, 0-9, `.`, `_`, `-`, `/`"));
            }
            let select = self.select(it, root);
            let client = format!("ghostwatch-{instance}-{name}");
            if let Some(target) = self.target(it, kind, client) {
                self.alone(it, &target, &sinks);
                sinks.push(SinkPlan { name, target, select });
            }
        }
        sinks
    }

    /// Refuses a second MQTT sink that would be in the way of the first.
    fn alone(&mut self, it: &Fields, target: &Target, others: &[SinkPlan]) {
        let Target::Mqtt(mine) = target else { return };
        for SinkPlan { name, target, .. } in others {
            if let Target::Mqtt(theirs) = target
                && let Some(clash) = mine.clash(theirs)
            {
                let message = format!("sink {name} has {}", escaped(&clash.why));
                self.problems.push(it.problem(clash.field, message));
            }
        }
    }

    /// Refuses fields that this type of sink does not have.
    fn belongs_to(&mut self, it: &Fields, kind: &str) {
        for (name, kinds) in SINK_FIELDS {
            if it.has(name) && !kinds.contains(&kind) {
                let whose = kinds.join(" or ");
                self.problems.push(it.problem(name, format!("only a {whose} sink can have this")));
            }
        }
    }

    fn select(&mut self, it: &Fields, root: &Fields) -> Select {
        let topic = |it: &Item| match &it.value {
            Value::Word(word) => Topic::ALL.into_iter().find(|topic| topic.name() == *word),
            _ => None,
        };
        let topics = it.list("types").unwrap_or_default().iter().filter_map(topic).collect();
        let streams: Vec<String> = it.list("streams").map(texts).unwrap_or_default();
        let known = |id: &String| root.entries("streams").iter().any(|it| it.0.name == *id);
        if let Some(id) = streams.iter().find(|it| !known(it)) {
            let message = format!("there is no stream {}", escaped(id));
            self.problems.push(it.problem("streams", message));
        }
        Select {
            topics,
            streams,
            min_confidence: it.number("min_confidence").map(|it| it as f32),
            top: it.int("top").map(|it| it as usize),
        }
    }

    fn target(&mut self, it: &Fields, kind: &str, client: String) -> Option<Target> {
        match kind {
            "stdout" => Some(Target::Stdout),
            "file" => {
                self.needed(it, "path", kind)?;
                let rotation = Rotation {
                    bytes: it.size("rotate_bytes").unwrap_or(100 << 20),
                    keep: it.int("keep").map_or(5, |it| it as u32),
                    sync: it.bool("sync").unwrap_or(false),
                };
                Some(Target::File(self.path(it, "path", false)?, rotation))
            }
            "nats" => self.nats(it).map(Target::Nats),
            "redis" => self.redis(it).map(Target::Redis),
            "mqtt" => self.mqtt(it, client).map(Target::Mqtt),
            "kafka" => self.kafka(it, client).map(Target::Kafka),
            _ => self.webhook(it).map(Target::Webhook),
        }
    }

    fn nats(&mut self, it: &Fields) -> Option<Nats> {
        self.needed(it, "servers", "nats")?;
        let servers = texts(it.list("servers")?);
        let plain = !servers.iter().any(|it| it.contains('@') || !it.contains("://"));
        if !plain {
            let problem = it.problem("servers", "these are no addresses of NATS servers");
            self.problems.push(problem.allowed("nats://host:port, without user name and password"));
        }
        let made = NatsStream::default();
        let settings = Nats {
            servers,
            subject_prefix: prefix(it, "ghostwatch.v1"),
            stream: it.text("stream").unwrap_or("GHOSTWATCH").to_owned(),
            create: NatsStream {
                max_age: it.duration("max_age"),
                max_bytes: it.size("max_bytes"),
                replicas: it.int("replicas").map_or(made.replicas, |it| it as usize),
                duplicate_window: it.duration("duplicate_window").unwrap_or(made.duplicate_window),
            },
            tls: self.tls_of(it),
            login: self.login(it),
            timeout: timeout(it),
        };
        if plain {
            self.checked(it, nats::check(&settings));
        }
        Some(settings)
    }

    fn redis(&mut self, it: &Fields) -> Option<Redis> {
        let url = self.needed(it, "url", "redis")?;
        let (address, database) = match Address::of(url, ["redis", "rediss"], [6379, 6379]) {
            Ok(found) => found,
            Err(error) => {
                self.problems.push(it.problem("url", escaped(&format!("{error:#}"))));
                return None;
            }
        };
        let database = if database.is_empty() { "0" } else { database };
        let Ok(database) = database.parse() else {
            let problem = it.problem("url", "what stands after the slash is no database");
            self.problems.push(problem.allowed("a number from 0"));
            return None;
        };
        let tls = self.tls_of(it);
        if tls.is_some() && !address.tls {
            self.problems.push(it.problem("tls", "the URL says redis://, which has no TLS"));
        }
        Some(Redis {
            host: address.host,
            port: address.port,
            database,
            key_prefix: prefix(it, "ghostwatch"),
            max_entries: it.int("max_entries").map(i64::unsigned_abs),
            tls: address.tls.then(|| tls.unwrap_or_default()),
            login: self.login(it),
            timeout: timeout(it),
        })
    }

    fn mqtt(&mut self, it: &Fields, client: String) -> Option<Mqtt> {
        let address = match Address::parse(self.needed(it, "url", "mqtt")?) {
            Ok(address) => address,
            Err(error) => {
                self.problems.push(it.problem("url", escaped(&format!("{error:#}"))));
                return None;
            }
        };
        let tls = self.tls_of(it);
        if tls.is_some() && !address.tls {
            self.problems.push(it.problem("tls", "the URL says mqtt://, which has no TLS"));
        }
        let usual = Mqtt::new(address, it.text("client_id").map_or(client, str::to_owned));
        let settings = Mqtt {
            topic_prefix: prefix(it, &usual.topic_prefix),
            keep_alive: it.duration("keep_alive").unwrap_or(usual.keep_alive),
            ack_timeout: it.duration("timeout").unwrap_or(usual.ack_timeout),
            packet_bytes_max: message_bytes(it).unwrap_or(usual.packet_bytes_max),
            retain_label: it.bool("retain_label").unwrap_or(usual.retain_label),
            tls: tls.unwrap_or_default(),
            login: self.login(it),
            ..usual
        };
        self.checked(it, settings.check());
        Some(settings)
    }

    fn kafka(&mut self, it: &Fields, client: String) -> Option<Kafka> {
        if cfg!(not(feature = "kafka")) {
            let message = "this build has no Kafka; build it with `--features kafka`";
            self.problems.push(it.problem("type", message));
        }
        self.needed(it, "servers", "kafka")?;
        let client = it.text("client_id").map_or(client, str::to_owned);
        let usual = Kafka::new(texts(it.list("servers")?), client);
        let settings = Kafka {
            topic_prefix: prefix(it, &usual.topic_prefix),
            ack_timeout: it.duration("timeout").unwrap_or(usual.ack_timeout),
            message_bytes_max: message_bytes(it).unwrap_or(usual.message_bytes_max),
            tls: self.tls_of(it),
            mechanism: match it.word("mechanism") {
                Some("plain") => Mechanism::Plain,
                Some("scram-sha-256") => Mechanism::ScramSha256,
                _ => usual.mechanism,
            },
            login: self.login(it),
            ..usual
        };
        self.checked(it, settings.check());
        Some(settings)
    }

    fn webhook(&mut self, it: &Fields) -> Option<Webhook> {
        let url = Secret::new(self.needed(it, "url", "webhook")?);
        let mut headers = Vec::new();
        for header in it.list("headers").map(texts).unwrap_or_default() {
            let Some((name, value)) = header.split_once(':') else {
                let problem = it.problem("headers", "a header has no colon");
                self.problems.push(problem.allowed("Name: value"));
                continue;
            };
            headers.push((name.trim().to_owned(), Secret::new(value.trim())));
        }
        let settings = Webhook {
            url,
            headers,
            login: self.login(it),
            batch_events: it.int("batch_events").map_or(500, |it| it as usize),
            batch_bytes: it.size("batch_bytes").map_or(1 << 20, |it| it as usize),
            tls: self.tls_of(it).unwrap_or_default(),
            connect_timeout: Duration::from_secs(10),
            timeout: timeout(it),
        };
        self.checked(it, webhook::check(&settings));
        Some(settings)
    }

    /// The text of a field that this type of sink must have; any text for a list that is there.
    fn needed<'a>(&mut self, it: &'a Fields, name: &str, kind: &str) -> Option<&'a str> {
        if !it.has(name) {
            self.problems.push(it.problem(name, format!("a {kind} sink needs it")));
            return None;
        }
        it.text(name).or_else(|| it.list(name).map(|_| ""))
    }

    fn tls_of(&mut self, it: &Fields) -> Option<Tls> {
        if !it.has("tls") {
            return None;
        }
        let tls = it.map("tls").clone();
        if tls.has("cert_file") != tls.has("key_file") {
            let name = if tls.has("cert_file") { "cert_file" } else { "key_file" };
            self.problems.push(tls.problem(name, "cert_file and key_file come together"));
        }
        Some(Tls {
            ca_file: self.path(&tls, "ca_file", true),
            cert_file: self.path(&tls, "cert_file", true),
            key_file: self.path(&tls, "key_file", true),
        })
    }

    fn login(&mut self, it: &Fields) -> Login {
        self.warn_inline(it, false);
        let token = self.secret_file(it, "token_file");
        let (username, password) = self.credentials(it, None, None);
        if it.has("token_file") && (username.is_some() || password.is_some()) {
            self.problems.push(it.problem("token_file", "there is a user name or password too"));
        }
        Login { username: username.map(|it| it.expose().to_owned()), password, token }
    }

    fn checked(&mut self, it: &Fields, result: Result<(), Unusable>) {
        if let Err(Unusable { field, why }) = result {
            self.problems.push(it.problem(field, escaped(&why)));
        }
    }
}

fn texts(items: &[Item]) -> Vec<String> {
    let text = |it: &Item| match &it.value {
        Value::Text { text, .. } => Some(text.clone()),
        _ => None,
    };
    items.iter().filter_map(text).collect()
}

fn prefix(it: &Fields, usual: &str) -> String {
    it.text("prefix").unwrap_or(usual).to_owned()
}

fn timeout(it: &Fields) -> Duration {
    it.duration("timeout").unwrap_or(Duration::from_secs(10))
}

fn message_bytes(it: &Fields) -> Option<usize> {
    it.size("message_bytes").map(|it| it as usize)
}

#[cfg(test)]
#[path = "sinks_tests.rs"]
mod tests;
