//! From GStreamer's errors to ours: a code, and a text without secrets.

use std::time::Duration;

use gstreamer::{self as gst, glib};
use tokio_util::sync::CancellationToken;

use crate::{
    frame::Code,
    source::{
        SourceError, Spec,
        gst::{redact::redacted, tls},
        reach,
    },
};

/// Longest time to find out why a connection failed; nothing can stop it.
const DIAGNOSIS_MAX: Duration = Duration::from_secs(2);

/// Says what an error message means for `spec`'s stream.
pub fn translate(message: &gst::message::Error, spec: &Spec) -> SourceError {
    let error = message.error();
    // The first line says where in GStreamer's sources it was.
    let debug = message.debug().unwrap_or_default();
    let reason = debug.split_once('\n').map_or("", |it| it.1);
    let text = match reason.is_empty() || error.message().contains(reason) {
        true => error.message().to_owned(),
        false => format!("{} {reason}", error.message()),
    };
    let code = code(&error, &text);
    SourceError { code, detail: redacted(&format!("{}: {text}", spec.url), spec) }
}

fn code(error: &glib::Error, text: &str) -> Code {
    use gst::{CoreError, ResourceError, StreamError};
    // 454: the camera has forgotten the connection, not the stream; the next one will do.
    let text = text.to_ascii_lowercase().replace("session not found", "");
    let says = |words: &[&str]| words.iter().any(|it| text.contains(it));
    let resource = error.kind::<ResourceError>();
    // `Failed` is what every element says once another has said why.
    let stream = error.kind::<StreamError>();
    if resource == Some(ResourceError::NotAuthorized)
        || says(&["unauthorized", "(401)", "forbidden"])
    {
        Code::Auth
    } else if says(&["resolv", "name or service not known", "no address associated"]) {
        Code::Dns
    } else if says(&["refused"]) {
        Code::Refused
    } else if says(&["tls", "certificate", "handshake"]) {
        Code::Tls
    } else if says(&["timeout", "timed out"]) {
        Code::Timeout
    } else if resource == Some(ResourceError::NotFound) || says(&["not found", "(404)"]) {
        Code::NotFound
    } else if stream.is_some_and(|it| it != StreamError::Failed)
        || error.kind::<CoreError>() == Some(CoreError::MissingPlugin)
        || says(&["sdp contains no streams"])
    {
        Code::Codec
    } else {
        Code::Error
    }
}

/// Whether the host of a stream answers at all within `most`. `Ok` without a network.
///
/// # Errors
/// Why it does not answer.
pub fn reached(spec: &Spec, most: Duration, stop: &CancellationToken) -> Result<(), SourceError> {
    let Some((remote, scheme)) = spec.url.remote() else { return Ok(()) };
    let server = (&*remote.host, remote.port_or_default(scheme));
    reach::reach(server, most, stop).map_err(|(code, why)| {
        let detail = redacted(&format!("{}: failed to connect: {why}", spec.url), spec);
        SourceError { code, detail }
    })
}

/// Connects once more, in a way that says why it fails: souphttpsrc and rtspsrc give most of
/// their failures as `Internal data stream error` and `Generic error`. `None` if it succeeds.
pub fn diagnosed(spec: &Spec) -> Option<SourceError> {
    let (remote, scheme) = spec.url.remote()?;
    if let Err(error) = reached(spec, DIAGNOSIS_MAX, &CancellationToken::new()) {
        return Some(error);
    }
    let server = (&*remote.host, remote.port_or_default(scheme));
    let why = remote.tls.then(|| tls::refused(server, &spec.tls, DIAGNOSIS_MAX)).flatten()?;
    let detail = format!("{}: failed to connect: TLS: {why}", spec.url);
    Some(SourceError { code: Code::Tls, detail: redacted(&detail, spec) })
}
