//! Takes out of a text what the owner of a URL keeps secret, in every form that GStreamer, a camera
//! or a server can give it.

use std::{fmt, sync::Arc};

use gstreamer::glib;

use crate::{
    secret::Secret,
    source::{
        Spec,
        url::{SourceUrl, decode, escaped},
    },
};

/// Longest text that is passed on.
const DETAIL_MAX: usize = 400;

/// Values in a query and user names that are shorter are no secrets, but parts of words.
const SECRET_MIN: usize = 3;

/// What stands in place of a secret.
const HIDDEN: &str = "***";

/// The secrets of one stream. Cheap to clone; never prints them.
#[derive(Clone, PartialEq, Eq)]
pub struct Redactor(Arc<[(String, String)]>);

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({})", self.0.len())
    }
}

impl Redactor {
    /// Knows what is secret in `spec`.
    pub fn new(spec: &Spec) -> Redactor {
        let mut hide = Vec::new();
        if let SourceUrl::Rtsp(remote) | SourceUrl::Http(remote) = &spec.url {
            let shown = spec.url.to_string();
            for scheme in ["rtsp", "http"] {
                hide.push((remote.location(scheme).expose().to_owned(), shown.clone()));
            }
            let location = remote.location("rtsp");
            location_secrets(location.expose()).iter().for_each(|it| forms(it, &mut hide));
        }
        let (name, password) = (spec.username.as_ref(), spec.password.as_ref());
        let (name, password) = (name.map(Secret::expose), password.map(Secret::expose));
        if let Some(password) = password {
            // What HTTP and RTSP call Basic.
            let both = format!("{}:{password}", name.unwrap_or_default());
            hide.push((glib::base64_encode(both.as_bytes()).into(), HIDDEN.to_owned()));
            forms(password, &mut hide);
        }
        // A user name such as `a` is not what must be kept; tearing every word apart would be.
        if let Some(name) = name.filter(|it| SECRET_MIN <= it.len()) {
            forms(name, &mut hide);
        }
        hide.retain(|it| !it.0.is_empty() && it.0 != it.1);
        // The longest first: one secret can be part of another.
        hide.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
        hide.dedup();
        Redactor(hide.into())
    }

    /// `text` without the secrets.
    pub fn hide(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (secret, shown) in &*self.0 {
            if text.contains(secret) {
                text = text.replace(secret, shown);
            }
        }
        text
    }

    /// `text` on one line, cut to `max` characters, without the secrets.
    pub fn line(&self, text: &str, max: usize) -> String {
        let line = escaped(&self.hide(text).replace('\n', " "));
        match line.char_indices().nth(max) {
            Some((at, _)) => format!("{}…", &line[..at]),
            None => line,
        }
    }
}

/// `text` on one line, cut to a sane length, with nothing in it that the URL's owner keeps secret.
pub fn redacted(text: &str, spec: &Spec) -> String {
    Redactor::new(spec).line(text, DETAIL_MAX)
}

/// What can be secret in a URL: its query, the values in it, and what follows the first `=` or `;`
/// of its path.
fn location_secrets(location: &str) -> Vec<&str> {
    let (path, query) = location.split_at(location.find(['?', '#']).unwrap_or(location.len()));
    let values = query.split(['?', '#', '&', ';']).filter_map(|it| it.split_once('='));
    let mut found: Vec<_> = values.map(|it| it.1).collect();
    found.push(query.get(1..).unwrap_or_default());
    found.extend(path.split_once(['=', ';']).map(|it| it.1));
    found.retain(|it| SECRET_MIN < it.len());
    found
}

/// Adds the forms in which `secret` can come back.
fn forms(secret: &str, hide: &mut Vec<(String, String)>) {
    let upper = encoded(secret);
    let decoded = decode(secret).ok();
    let lower = lower_hex(&upper);
    let base64 = String::from(glib::base64_encode(secret.as_bytes()));
    // How a quoted string is written in a header, or by GStreamer's own structures.
    let quoted = secret.replace('\\', "\\\\").replace('"', "\\\"");
    let more = [Some(secret.to_owned()), Some(upper), Some(lower), Some(base64), Some(quoted)];
    for form in more.into_iter().chain([decoded]).flatten() {
        hide.push((form, HIDDEN.to_owned()));
    }
}

fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|it| if plain(it) { char::from(it).to_string() } else { format!("%{it:02X}") })
        .collect()
}

/// `%2F` as `%2f`.
fn lower_hex(encoded: &str) -> String {
    let mut left = 0_u32;
    let lower = |it: char| {
        left = if it == '%' { 3 } else { left };
        let hex = 0 < left;
        left = left.saturating_sub(1);
        if hex { it.to_ascii_lowercase() } else { it }
    };
    encoded.chars().map(lower).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWORD: &str = "c@n:/?#%&'\"\\ré";

    #[test]
    fn a_secret_is_hidden_in_every_form_and_the_rest_is_kept() {
        let spec = Spec {
            username: Some(Secret::new("viewer")),
            password: Some(Secret::new(PASSWORD)),
            ..Spec::parse("rtsp://cam:554/a?token=s%C3%A9cret&sub=1").unwrap()
        };
        let upper = encoded(PASSWORD);
        let both = glib::base64_encode(format!("viewer:{PASSWORD}").as_bytes());
        for secret in [
            PASSWORD,
            &upper,
            &lower_hex(&upper),
            &both,
            &glib::base64_encode(PASSWORD.as_bytes()),
            "s%C3%A9cret",
            "sécret",
            "token=s%C3%A9cret&sub=1",
        ] {
            let text = redacted(&format!("before\x1b {secret}\nafter"), &spec);
            assert_eq!(text, "before\\u{1b} *** after", "{secret}");
        }
        let text = redacted("rtsp://cam:554/a?token=s%C3%A9cret&sub=1/track", &spec);
        assert_eq!(text, "rtsp://cam:554/a?***/track");
        assert_eq!(format!("{:?}", Redactor::new(&spec)).matches("cret").count(), 0);
    }

    #[test]
    fn a_long_text_is_cut_after_its_secrets_are_out() {
        let spec = Spec { password: Some(Secret::new("hidden")), ..Spec::parse("a.mp4").unwrap() };
        let text = redacted(&format!("{}hidden", "é".repeat(DETAIL_MAX - 3)), &spec);
        assert_eq!(text, format!("{}***", "é".repeat(DETAIL_MAX - 3)));
        assert_eq!(redacted(&"x".repeat(500), &spec).chars().count(), DETAIL_MAX + 1);
    }

    #[test]
    fn only_the_digits_of_an_escape_change_their_case() {
        assert_eq!(lower_hex("A%2FB%C3%A9C%2"), "A%2fB%c3%a9C%2");
    }
}
