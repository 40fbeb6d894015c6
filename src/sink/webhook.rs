//! Batches of events as NDJSON by `POST` to a URL.
//!
//! One request is under way at a time, so the order is the journal's. Its `Idempotency-Key` is the
//! first and the last event's id, `<first>-<last>`. A batch that got no answer is sent again as
//! the same batch with the same key, as long as the process lives; after a restart its events may
//! come in another batch, so who counts must go by the ids of the events.
//!
//! A status of 2xx acknowledges the whole batch, and is worth what the receiver did before it
//! answered. Redirects are not followed, since they could lead secrets elsewhere.
//!
//! The client is hyper's, on one connection: a pool, proxies, cookies and HTTP/2 are of no use to
//! one request at a time, and hyper serves our own HTTP already.

use std::time::Duration;

use anyhow::anyhow;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    client::conn::http1::{self, SendRequest},
    header::{
        AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
        USER_AGENT,
    },
};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use crate::{
    secret::Secret,
    sink::{
        broker::{Acks, Broker, Code, Fault, Message},
        settings::{Login, Unusable, Webhook as Settings},
        tls,
    },
};

/// As much of an answer as is read; what follows costs the connection, not memory.
const ANSWER_BYTES: usize = 64 * 1024;
/// As much of an answer as is shown.
const SHOWN_CHARS: usize = 200;
/// A receiver can ask for a longer pause, but not get it.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// One receiver.
#[derive(Debug)]
pub struct Webhook {
    settings: Settings,
    target: Target,
    connection: Option<Sender>,
    /// The first and the last id of a batch that was sent and not answered.
    unanswered: Option<(String, String)>,
}

type Sender = SendRequest<Full<Bytes>>;

/// What the settings say, checked.
#[derive(Debug)]
struct Target {
    uri: Uri,
    host: String,
    port: u16,
    secure: bool,
    headers: HeaderMap,
}

/// Checks the URL and the headers.
///
/// # Errors
/// They cannot be used; the text shows no more of them than a header's name.
pub fn check(settings: &Settings) -> Result<(), Unusable> {
    Target::of(settings).map(drop)
}

impl Webhook {
    /// Connects nowhere yet.
    ///
    /// # Errors
    /// The URL or a header cannot be used; the text does not show them.
    pub fn new(settings: Settings) -> Result<Webhook, Unusable> {
        let target = Target::of(&settings)?;
        Ok(Webhook { settings, target, connection: None, unanswered: None })
    }

    /// How many messages go into the next request.
    fn fitting(&self, messages: &[Message], most: usize) -> usize {
        if let Some((first, last)) = &self.unanswered
            && messages[0].id == *first
            && let Some(at) = messages.iter().position(|it| it.id == *last)
            && at < most
        {
            return at + 1;
        }
        let mut bytes = 0;
        let fits = |it: &&Message| {
            bytes += it.json.len() + 1;
            bytes <= self.settings.batch_bytes
        };
        messages.iter().take(most).take_while(fits).count().max(1)
    }

    async fn open(&mut self) -> Result<(), Fault> {
        self.connection = None;
        let Target { host, port, secure, .. } = &self.target;
        let opened = async {
            let tls = secure.then_some(&self.settings.tls);
            let stream = TokioIo::new(tls::connect(host, *port, tls).await?);
            let shaken = http1::handshake(stream).await;
            shaken.map_err(|error| tls::fault(error, &self.target.place()))
        };
        let (sender, driver) =
            timeout(self.settings.connect_timeout, opened).await.map_err(|_| {
                let secs = self.settings.connect_timeout.as_secs_f32();
                let what = anyhow!("{}: no connection within {secs} s", self.target.place());
                Fault::new(Code::Timeout, what)
            })??;
        // Its errors come out of the requests too. It ends when the sender is dropped.
        tokio::spawn(driver);
        self.connection = Some(sender);
        Ok(())
    }

    fn request(&self, batch: &[Message]) -> Request<Full<Bytes>> {
        let bytes = batch.iter().map(|it| it.json.len() + 1).sum();
        let mut body = Vec::with_capacity(bytes);
        for it in batch {
            body.extend_from_slice(it.json.as_bytes());
            body.push(b'\n');
        }
        let mut request = Request::post(self.target.uri.clone())
            .body(Full::new(Bytes::from(body)))
            .expect("a checked URL makes a request");
        let key = format!("{}-{}", batch[0].id, batch[batch.len() - 1].id);
        *request.headers_mut() = self.target.headers.clone();
        let key = HeaderValue::from_str(&key).expect("ids are letters, digits and hyphens");
        request.headers_mut().insert("idempotency-key", key);
        request
    }

    /// Sends a batch and reads the answer. A connection that was kept open may have been closed by
    /// the receiver just then, which is no failure: the batch is sent once more on a new one.
    async fn exchange(&mut self, batch: &[Message]) -> Result<Answer, Fault> {
        let kept = self.connection.as_ref().is_some_and(|it| !it.is_closed());
        if !kept {
            self.open().await?;
        }
        match self.once(batch).await {
            Err(fault) if kept && fault.code == Code::Error => {
                self.open().await?;
                self.once(batch).await
            }
            other => other,
        }
    }

    async fn once(&mut self, batch: &[Message]) -> Result<Answer, Fault> {
        let request = self.request(batch);
        let mut sender = self.connection.take().expect("a connection was opened");
        let exchanged = async {
            let answer = sender.send_request(request).await?;
            Ok::<_, hyper::Error>(Answer::read(answer).await)
        };
        match timeout(self.settings.timeout, exchanged).await {
            Ok(Ok((answer, whole))) => {
                self.connection = whole.then_some(sender);
                Ok(answer)
            }
            Ok(Err(error)) => Err(tls::fault(error, &self.target.place())),
            Err(_) => {
                let secs = self.settings.timeout.as_secs_f32();
                let what = anyhow!("{}: no answer within {secs} s", self.target.place());
                Err(Fault::new(Code::Timeout, what))
            }
        }
    }
}

impl Target {
    fn of(settings: &Settings) -> Result<Target, Unusable> {
        let bad = |why: &str| Unusable::new("url", why);
        let uri: Uri = settings
            .url
            .expose()
            .parse()
            .map_err(|it| Unusable::new("url", format!("it is no URL: {it}")))?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad("it must begin with http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it holds a user or password; give them apart"));
        }
        let (host, port) = (authority.host().to_owned(), authority.port_u16());
        if host.is_empty() {
            return Err(bad("it names no host"));
        }
        if port.is_none() && authority.as_str().len() != host.len() {
            return Err(bad("its port is no number from 0 to 65535"));
        }
        let mut headers = HeaderMap::new();
        let named = HeaderValue::from_str(authority.as_str());
        headers.insert(HOST, named.map_err(|_| bad("its host is no header"))?);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
        let agent = concat!("ghostwatch/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        let Login { username, password, token } = &settings.login;
        if let Some(token) = token {
            let value = secret(&format!("Bearer {}", token.expose()));
            let no_header = "its token has characters that a header cannot have";
            let value = value.ok_or_else(|| Unusable::new("token_file", no_header))?;
            headers.insert(AUTHORIZATION, value);
        } else if username.is_some() || password.is_some() {
            let password = password.as_ref().map_or("", Secret::expose);
            let both = format!("{}:{password}", username.as_deref().unwrap_or(""));
            let value = secret(&format!("Basic {}", STANDARD.encode(both)));
            headers.insert(AUTHORIZATION, value.expect("base64 has only letters of a header"));
        }
        for (name, value) in &settings.headers {
            let bad = |why| Unusable::new("headers", format!("{name:?} {why}"));
            let known = HeaderName::try_from(name).map_err(|_| bad("is no name of a header"))?;
            let value = secret(value.expose());
            let no_value = "has a value with characters that a header cannot have";
            headers.insert(known, value.ok_or_else(|| bad(no_value))?);
        }
        // A request names the path only; the host stands in its header.
        let path = uri.path_and_query().map_or("/", |it| it.as_str()).parse();
        let path = path.map_err(|_| bad("its path cannot be asked for"))?;
        let port = port.unwrap_or(if secure { 443 } else { 80 });
        Ok(Target { uri: path, host, port, secure, headers })
    }

    fn place(&self) -> String {
        format!("webhook {}:{}", self.host, self.port)
    }
}

/// What a receiver said.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    retry_after: Option<Duration>,
    /// The beginning of its body, escaped.
    said: String,
}

impl Answer {
    /// The answer, and whether it was read to its end.
    async fn read(answer: Response<Incoming>) -> (Answer, bool) {
        let status = answer.status();
        let retry_after = answer.headers().get(RETRY_AFTER).and_then(|it| it.to_str().ok());
        let retry_after =
            retry_after.and_then(|it| it.trim().parse().ok()).map(Duration::from_secs);
        // The status is there, and stands whatever becomes of the body.
        let body = Limited::new(answer.into_body(), ANSWER_BYTES).collect().await;
        let (text, whole) = match body {
            Ok(it) => (String::from_utf8_lossy(&it.to_bytes()).into_owned(), true),
            Err(_) => (String::new(), false),
        };
        let said = text.trim().chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
        (Answer { status, retry_after, said }, whole)
    }

    fn fault(self, place: &str) -> Fault {
        let code = match self.status.as_u16() {
            401 | 403 | 407 => Code::Auth,
            404 | 410 => Code::NotFound,
            408 | 504 => Code::Timeout,
            413 => Code::TooLarge,
            429 | 507 => Code::Full,
            _ => Code::Error,
        };
        let advice = if self.status.is_redirection() {
            "; redirects are not followed, name the place itself"
        } else {
            ""
        };
        let said = if self.said.is_empty() { String::new() } else { format!(": {}", self.said) };
        let what = anyhow!("{place}: answered {}{said}{advice}", self.status);
        let mut fault = Fault::new(code, what);
        fault.retry_after = self.retry_after.map(|it| it.min(RETRY_AFTER_MAX));
        fault
    }
}

impl Broker for Webhook {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.open().await
    }

    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        let mut most = self.settings.batch_events.max(1);
        while acks.count() < messages.len() {
            let rest = &messages[acks.count()..];
            let batch = &rest[..self.fitting(rest, most)];
            let ends = |it: &Message, last: &Message| (it.id.clone(), last.id.clone());
            self.unanswered = Some(ends(&batch[0], &batch[batch.len() - 1]));
            let answer = self.exchange(batch).await?;
            if answer.status.is_success() {
                self.unanswered = None;
                batch.iter().for_each(|_| acks.next(false));
                most = (most * 2).min(self.settings.batch_events.max(1));
            } else if answer.status == StatusCode::PAYLOAD_TOO_LARGE && batch.len() > 1 {
                self.unanswered = None;
                most = batch.len().div_ceil(2);
            } else {
                return Err(answer.fault(&self.target.place()));
            }
        }
        Ok(())
    }

    async fn lost(&mut self) -> Fault {
        // A receiver may close a connection that is idle; the next request opens another.
        std::future::pending().await
    }

    async fn close(&mut self) {
        self.connection = None;
    }
}

/// A header's value that is never printed; `None` if it cannot be one.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::settings::Tls;

    #[test]
    fn a_user_and_password_are_written_as_rfc_7617_says() {
        let login = Login {
            username: Some("Aladdin".to_owned()),
            password: Some(Secret::new("open sesame")),
            token: None,
        };
        let settings = Settings {
            url: Secret::new("http://h/"),
            headers: Vec::new(),
            login,
            batch_events: 1,
            batch_bytes: 1,
            tls: Tls::default(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
        };
        let target = Target::of(&settings).unwrap();
        assert_eq!(target.headers[AUTHORIZATION], "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
    }
}
