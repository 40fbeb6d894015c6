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

/// Digits of a base64 form that are looked for at least: fewer are found in any text.
const CODED_MIN: usize = 4;

/// The secrets of one stream. Cheap to clone; never prints them.
#[derive(Clone, PartialEq, Eq)]
pub struct Redactor(Arc<Secrets>);

#[derive(PartialEq, Eq)]
struct Secrets {
    /// Looked for as they are, each with what is shown in its place.
    plain: Vec<(String, String)>,
    /// Looked for with every escape taken out, of them and of the text.
    bare: Vec<Vec<u8>>,
    /// The middle of base64 forms; what they are part of goes with them.
    coded: Vec<Vec<u8>>,
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({})", self.0.plain.len())
    }
}

impl Redactor {
    /// Knows what is secret in `spec`.
    pub fn new(spec: &Spec) -> Redactor {
        let (mut plain, mut secrets) = (Vec::new(), Vec::new());
        if let SourceUrl::Rtsp(remote) | SourceUrl::Http(remote) = &spec.url {
            let shown = spec.url.to_string();
            for scheme in ["rtsp", "http"] {
                plain.push((remote.location(scheme).expose().to_owned(), shown.clone()));
            }
            let location = remote.location("rtsp");
            for secret in location_secrets(location.expose()) {
                // A server that has taken its escapes out can give it back so.
                let decoded = decode(secret).ok();
                secrets.extend(decoded.filter(|it| SECRET_MIN < it.trim().len()));
                secrets.push(secret.to_owned());
            }
        }
        let (name, password) = (spec.username.as_ref(), spec.password.as_ref());
        let (name, password) = (name.map(Secret::expose), password.map(Secret::expose));
        let mut coded = Vec::new();
        if let Some(password) = password {
            // What HTTP and RTSP call Basic: even of a password that alone would be too short.
            coded.push(middle(format!("{}:{password}", name.unwrap_or_default()).as_bytes(), 0));
            secrets.push(password.to_owned());
        }
        // A user name such as `a` is not what must be kept; tearing every word apart would be.
        secrets.extend(name.filter(|it| SECRET_MIN <= it.len()).map(str::to_owned));
        let mut bare = Vec::new();
        for secret in secrets {
            coded.extend((0..3).map(|before| middle(secret.as_bytes(), before)));
            bare.push(Bare::of(&secret, false).bytes);
            plain.push((secret, HIDDEN.to_owned()));
        }
        plain.retain(|it| !it.0.is_empty() && it.0 != it.1);
        // The longest first: one secret can be part of another.
        plain.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
        plain.dedup();
        // The alphabet that is used in URLs.
        let other = |it: &Vec<u8>| {
            let digit = |it: &u8| match it {
                b'+' => b'-',
                b'/' => b'_',
                _ => *it,
            };
            it.iter().map(digit).collect()
        };
        let in_urls: Vec<Vec<u8>> = coded.iter().map(other).collect();
        coded.extend(in_urls);
        coded.retain(|it| CODED_MIN <= it.len());
        for list in [&mut bare, &mut coded] {
            list.retain(|it| !it.is_empty());
            list.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
            list.dedup();
        }
        Redactor(Arc::new(Secrets { plain, bare, coded }))
    }

    /// `text` without the secrets.
    pub fn hide(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (secret, shown) in &self.0.plain {
            if text.contains(secret) {
                text = text.replace(secret, shown);
            }
        }
        let Secrets { bare, coded, .. } = &*self.0;
        // Base64 has nothing to escape but its padding.
        if coded.iter().any(|it| find(text.as_bytes(), it).is_some()) {
            text = Bare::of(&text, false).without(text, coded, true);
        }
        if text.contains(['\\', '%']) {
            for percent in [false, true] {
                text = Bare::of(&text, percent).without(text, bare, false);
                text = Bare::of(&text, percent).without(text, coded, true);
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

/// A text with its escapes taken out: backslashes, as GStreamer puts them before most characters of a
/// string and again for each structure that this one lies in; octal digits after them; and those of
/// URLs, if wished.
struct Bare {
    bytes: Vec<u8>,
    /// Where each byte begins in the text, its escape included, and last where the text ends.
    at: Vec<usize>,
}

impl Bare {
    fn of(text: &str, percent: bool) -> Bare {
        let raw = text.as_bytes();
        let mut bare = Bare { bytes: Vec::new(), at: Vec::new() };
        let (mut start, mut at) = (0, 0);
        while at < raw.len() {
            let slashes = raw[at..].iter().take_while(|it| **it == b'\\').count();
            let rest = &raw[at + slashes..];
            let Some(first) = rest.first() else { break };
            let octal = (0 < slashes).then(|| number(rest, 3, 8)).flatten();
            let hex = || (percent && *first == b'%').then(|| number(&rest[1..], 2, 16)).flatten();
            let (byte, length) = octal.or_else(hex).map_or((*first, 1), |it| (it, 3));
            at += slashes + length;
            // One more escape, itself escaped.
            if byte != b'\\' {
                bare.bytes.push(byte);
                bare.at.push(start);
                start = at;
            }
        }
        bare.at.push(raw.len());
        bare
    }

    /// The text that this was made of, without what stands for one of `secrets`. The middle of a
    /// base64 form takes all digits around it along.
    fn without(mut self, text: String, secrets: &[Vec<u8>], coded: bool) -> String {
        let mut text = text;
        for secret in secrets {
            let mut from = 0;
            while let Some(found) = find(&self.bytes[from..], secret) {
                let (mut start, mut end) = (from + found, from + found + secret.len());
                if coded {
                    let before = self.bytes[..start].iter().rev();
                    start -= before.take_while(|it| is_digit(**it)).count();
                    end += self.bytes[end..].iter().take_while(|it| is_digit(**it)).count();
                }
                let (first, after) = (self.at[start], self.at[end]);
                text.replace_range(first..after, HIDDEN);
                let hidden = (0..HIDDEN.len()).map(|it| first + it);
                let grown = first + HIDDEN.len();
                let rest: Vec<_> = self.at[end..].iter().map(|it| it - after + grown).collect();
                self.at.truncate(start);
                self.at.extend(hidden.chain(rest));
                self.bytes.splice(start..end, HIDDEN.bytes());
                from = start + HIDDEN.len();
            }
        }
        text
    }
}

/// Where `part` begins in `text`.
fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    let (first, rest) = part.split_first()?;
    let mut from = 0;
    while let Some(found) = text[from..].iter().position(|it| it == first) {
        from += found + 1;
        if text[from..].starts_with(rest) {
            return Some(from - 1);
        }
    }
    None
}

/// The byte that so many digits stand for; `None` iff there are none.
fn number(text: &[u8], digits: usize, radix: u32) -> Option<u8> {
    let digits = std::str::from_utf8(text.get(..digits)?).ok()?;
    // `+7` is a number too.
    let whole = digits.bytes().all(|it| it.is_ascii_hexdigit());
    whole.then(|| u8::from_str_radix(digits, radix).ok()).flatten()
}

/// Whether base64 uses it, in one of its alphabets or as padding.
fn is_digit(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"+/-_=".contains(&byte)
}

/// The base64 digits that hold bits of `secret` alone where so many bytes stand before it: what is
/// around it changes the others.
fn middle(secret: &[u8], before: usize) -> Vec<u8> {
    let all = [&vec![0; before % 3], secret].concat();
    let text = String::from(glib::base64_encode(&all));
    // A digit has six bits.
    let (first, after) = ((8 * (before % 3)).div_ceil(6), 8 * all.len() / 6);
    text.as_bytes().get(first..after).unwrap_or_default().to_vec()
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
        for secret in [
            PASSWORD,
            &upper,
            &upper.to_ascii_lowercase(),
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

    fn encoded(text: &str) -> String {
        text.bytes().map(|it| format!("%{it:02X}")).collect()
    }

    /// As GStreamer writes a string into a structure.
    fn wrapped(text: &str) -> String {
        let one = |it: u8| match it {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'+' | b'/' | b':' | b'.' => {
                char::from(it).to_string()
            }
            0x20..0x7f => format!("\\{}", char::from(it)),
            _ => format!("\\{it:03o}"),
        };
        text.bytes().map(one).collect()
    }

    fn check_hidden(spec: &Spec, secret: &str) {
        let text = redacted(&format!("a=(string)\"{secret}\"; end"), spec);
        assert_eq!(text, "a=(string)\"***\"; end", "{secret}");
    }

    #[test]
    fn a_secret_is_hidden_however_deep_in_structures_of_gstreamer_it_lies() {
        let spec = Spec {
            username: Some(Secret::new("viewer")),
            password: Some(Secret::new(PASSWORD)),
            ..Spec::parse("rtsp://cam:554/a?token=s%C3%A9cret").unwrap()
        };
        let basic = String::from(glib::base64_encode(format!("viewer:{PASSWORD}").as_bytes()));
        for secret in [PASSWORD, &encoded(PASSWORD), "s%C3%A9cret", "sécret", &basic] {
            let mut secret = secret.to_owned();
            for _ in 0..4 {
                secret = wrapped(&secret);
                check_hidden(&spec, &secret);
            }
        }
        // Only what must be is escaped, as in most URLs.
        check_hidden(&spec, "c@n:/%3F%23%25&'%22\\r%C3%A9");
        assert_eq!(redacted("50 % of C:\\clips\\a.mp4", &spec), "50 % of C:\\clips\\a.mp4");
    }

    #[test]
    fn base64_is_hidden_whatever_stands_around_the_secret_and_without_padding() {
        for password in [PASSWORD, "1234", "hunter2", "ÿÿÿÿÿ"] {
            let spec = Spec { password: Some(Secret::new(password)), ..Spec::parse("a").unwrap() };
            for (before, after) in [("", ""), ("u:", ""), ("us:", "x"), ("use:", "yz"), ("é", "!")]
            {
                let text = format!("{before}{password}{after}");
                let coded = String::from(glib::base64_encode(text.as_bytes()));
                check_hidden(&spec, &coded);
                check_hidden(&spec, coded.trim_end_matches('='));
                check_hidden(&spec, &wrapped(&coded));
                check_hidden(&spec, &coded.replace('+', "-").replace('/', "_"));
            }
        }
        // So short that the digits would be found anywhere: only as HTTP sends it.
        let spec = Spec {
            username: Some(Secret::new("u")),
            password: Some(Secret::new("ab")),
            ..Spec::parse("a").unwrap()
        };
        check_hidden(&spec, &glib::base64_encode(b"u:ab"));
    }

    #[test]
    fn text_of_any_kind_is_cut_between_characters() {
        let spec = Spec { password: Some(Secret::new("é\\303x")), ..Spec::parse("a").unwrap() };
        let parts = ["é", "\\303", "\\", "%C3", "%", "x", "\\251", "✓", "3"];
        let mut state = 1_u32;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..8 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                text += parts[(state >> 16) as usize % parts.len()];
            }
            assert!(!redacted(&text, &spec).contains("é\\303x"), "{text}");
        }
    }
}
