//! Where a stream comes from, as it is written in the configuration, and how it is printed.
//!
//! Nothing here prints a user name, a password, a query or the value of a path parameter: cameras
//! take secrets in all of them.

use std::{fmt, path::PathBuf};

use crate::secret::Secret;

/// Where a stream comes from, without user name and password. Prints without secrets.
#[derive(Clone, PartialEq, Eq)]
pub enum SourceUrl {
    /// A media file, or anything else that can be read like one.
    File(PathBuf),
    /// A camera or server, over RTSP.
    Rtsp(Remote),
    /// A camera or server, over HTTP.
    Http(Remote),
    /// A generated picture.
    Test(Pattern),
}

/// How RTP is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Inside the RTSP connection.
    Tcp,
    /// As datagrams.
    Udp,
    /// As datagrams, and inside the connection if none come.
    Auto,
}

/// The part of a URL behind its scheme.
#[derive(Clone, PartialEq, Eq)]
pub struct Remote {
    /// Whether the connection is encrypted (`rtsps`, `https`).
    pub tls: bool,
    /// Name or address; an IPv6 address without its brackets.
    pub host: String,
    /// `None` iff the scheme's default is meant.
    pub port: Option<u16>,
    /// Path and query as written, from the slash on. Can hold secrets.
    rest: Secret,
}

/// How the names of parameters end that sign in.
const SIGNS_IN: [&str; 11] =
    ["user", "use", "usr", "name", "word", "passwd", "pass", "pas", "pwd", "token", "key"];

/// A generated picture and its rate: `test:?size=1280x720&fps=30&frames=100`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Width in pixels, from 1.
    pub width: u32,
    /// Height in pixels, from 1.
    pub height: u32,
    /// Pictures per second, as a fraction.
    pub fps: (u32, u32),
    /// How many pictures; `None` for no end.
    pub frames: Option<u32>,
    /// The name of the pattern: `smpte`, `ball`, `red`, …
    pub pattern: String,
    /// The raw format: `I420`, `NV12`, `RGB`, `GRAY8`, or any other that can be converted.
    pub format: String,
}

/// A URL with the credentials that were written into it.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// The URL without them.
    pub url: SourceUrl,
    /// The user name, percent-decoded.
    pub username: Option<Secret>,
    /// The password, percent-decoded.
    pub password: Option<Secret>,
}

/// What is wrong with a source URL. Never quotes more of it than the scheme or a parameter's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Nothing was written, or only a scheme.
    #[error(
        "the source is empty; expected a path or a file:, rtsp:, rtsps:, http:, https: or test: URL"
    )]
    Empty,
    /// The scheme is not one of ours.
    #[error("unknown scheme `{0}`; expected file, rtsp, rtsps, http, https or test")]
    Scheme(String),
    /// There is no host, or it is not a name or address.
    #[error("the URL has no valid host; expected for example rtsp://camera.example/stream")]
    Host,
    /// The port is not a number.
    #[error(
        "the port is not a number from 1 to 65535; if the URL has a password, write its @ : / ? # percent-encoded, or better use password_file"
    )]
    Port,
    /// It cannot be said where the password ends.
    #[error(
        "an @ after the host makes the URL ambiguous; write @ : / ? # in user name, password and path percent-encoded, or better use password_file"
    )]
    Ambiguous,
    /// A percent sign without two hex digits, or bytes that are no text.
    #[error("a % is not followed by two hex digits, or the decoded bytes are not UTF-8")]
    Encoding,
    /// White space or a control character.
    #[error("the URL has white space or a control character in it; write it percent-encoded")]
    Control,
    /// `file://host/…` with a host other than this one.
    #[error("a file: URL with a host; expected file:///path")]
    FileHost,
    /// A parameter of a test pattern is unknown or out of range.
    #[error(
        "test pattern: {0}; expected test:?size=1280x720&fps=30, with frames=, pattern=, format= as wanted"
    )]
    Pattern(String),
}

impl SourceUrl {
    /// The host and what its default port is named after; `None` iff it needs no network.
    pub fn remote(&self) -> Option<(&Remote, &'static str)> {
        match self {
            SourceUrl::Rtsp(remote) => Some((remote, "rtsp")),
            SourceUrl::Http(remote) => Some((remote, "http")),
            SourceUrl::File(_) | SourceUrl::Test(_) => None,
        }
    }

    /// Reads a URL, or a plain path.
    ///
    /// # Errors
    /// What is wrong with it, without quoting it.
    pub fn parse(text: &str) -> Result<Parsed, UrlError> {
        if text.is_empty() {
            return Err(UrlError::Empty);
        }
        let without = |url| Ok(Parsed { url, username: None, password: None });
        let Some((scheme, rest)) = scheme(text) else {
            return without(SourceUrl::File(PathBuf::from(text)));
        };
        match scheme.as_str() {
            "file" => without(SourceUrl::File(file(rest)?)),
            "test" => without(SourceUrl::Test(pattern(rest)?)),
            "rtsp" | "rtspt" | "rtsps" | "http" | "https" => remote(&scheme, rest),
            _ => Err(UrlError::Scheme(scheme)),
        }
    }

    /// Whether pictures come in their own time, so that the newest counts more than all of them.
    pub fn is_live(&self) -> bool {
        matches!(self, SourceUrl::Rtsp(_) | SourceUrl::Http(_))
    }
}

impl Remote {
    /// The URL to connect to, with its path and query in full. Never print it.
    pub fn location(&self, scheme: &str) -> Secret {
        let s = if self.tls { "s" } else { "" };
        Secret::new(format!("{scheme}{s}://{}{}", self.authority(), self.rest.expose()))
    }

    /// The port, or the default of `scheme` (`rtsp` or `http`).
    pub fn port_or_default(&self, scheme: &str) -> u16 {
        self.port.unwrap_or(match (scheme, self.tls) {
            ("http", false) => 80,
            ("http", true) => 443,
            (_, false) => 554,
            (_, true) => 322,
        })
    }

    /// What in path and query stands for user name, password or token, as many recorders want it:
    /// `?user=a&password=b&channel=1`, `/user=a_password=b_channel=1.sdp`. `None` iff nothing does.
    pub fn signs_in(&self) -> Option<Secret> {
        let mut found: Vec<String> = Vec::new();
        for part in self.rest.expose().split(['/', '?', '#', '&', ';']) {
            let mut mine = false;
            for word in part.split('_') {
                match word.split_once('=') {
                    Some((name, _)) => {
                        let name = name.to_ascii_lowercase();
                        mine = SIGNS_IN.iter().any(|it| name.ends_with(it));
                        found.extend(mine.then(|| word.to_owned()));
                    }
                    // A value can have the character in it.
                    None if mine => found.iter_mut().last().into_iter().for_each(|it| *it += word),
                    None => {}
                }
            }
        }
        found.sort();
        (!found.is_empty()).then(|| Secret::new(found.join("&")))
    }

    fn authority(&self) -> String {
        let host =
            if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match self.port {
            Some(port) => format!("{host}:{port}"),
            None => host,
        }
    }

    /// The path with everything hidden that can be a secret.
    fn shown(&self) -> String {
        let rest = self.rest.expose();
        let (path, query) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
        // `/user=admin_password=…_channel=1` is how some recorders want it. An `@` here can be the
        // end of a password with a slash in it.
        let path = match path.rsplit_once('@') {
            _ if query.contains('@') => "/***".to_owned(),
            Some((_, after)) => format!("/***@{after}"),
            None => path.to_owned(),
        };
        let path = match path.split_once(['=', ';']) {
            Some((before, _)) => format!("{before}=***"),
            None => path,
        };
        if query.is_empty() { path } else { format!("{path}?***") }
    }
}

impl fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, remote) = match self {
            SourceUrl::File(path) => {
                return write!(f, "file:{}", escaped(&path.display().to_string()));
            }
            SourceUrl::Test(it) => {
                let (n, d) = it.fps;
                return write!(f, "test:?size={}x{}&fps={n}/{d}", it.width, it.height);
            }
            SourceUrl::Rtsp(remote) => ("rtsp", remote),
            SourceUrl::Http(remote) => ("http", remote),
        };
        let s = if remote.tls { "s" } else { "" };
        write!(f, "{scheme}{s}://{}{}", remote.authority(), remote.shown())
    }
}

impl fmt::Debug for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.authority(), self.shown())
    }
}

/// `text` with the control characters that a camera can put into it made visible.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Lower-case scheme and what follows the colon. `None` for a plain path.
fn scheme(text: &str) -> Option<(String, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let valid = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    valid.then(|| (scheme.to_ascii_lowercase(), rest))
}

fn file(rest: &str) -> Result<PathBuf, UrlError> {
    let path = match rest.strip_prefix("//") {
        // Only the form with slashes is a URL in the strict sense, where `%20` is a space.
        Some(full) => {
            let path = full.strip_prefix("localhost").unwrap_or(full);
            if !path.starts_with('/') {
                return Err(UrlError::FileHost);
            }
            decode(path)?
        }
        None => rest.to_owned(),
    };
    if path.is_empty() { Err(UrlError::Empty) } else { Ok(PathBuf::from(path)) }
}

fn remote(scheme: &str, rest: &str) -> Result<Parsed, UrlError> {
    if rest.contains(|c: char| c.is_control() || c == ' ') {
        return Err(UrlError::Control);
    }
    let rest = rest.strip_prefix("//").ok_or(UrlError::Host)?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    // Without a user, what looks like host and port can be the user and the start of a password
    // with a slash in it: `rtsp://user:8/x@host`.
    let colon = host.contains(':') && !host.ends_with(']');
    if (user.is_some() || colon) && rest.contains('@') {
        return Err(UrlError::Ambiguous);
    }
    let (host, port) = host_port(host)?;
    let (username, password) = match user {
        None => (None, None),
        Some(user) => match user.split_once(':') {
            Some((name, word)) => (Some(decode(name)?), Some(decode(word)?)),
            None => (Some(decode(user)?), None),
        },
    };
    let rest = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    let tls = scheme.ends_with('s');
    let remote = Remote { tls, host, port, rest: Secret::new(rest) };
    let url =
        if scheme.starts_with("rtsp") { SourceUrl::Rtsp(remote) } else { SourceUrl::Http(remote) };
    Ok(Parsed { url, username: username.map(Secret::new), password: password.map(Secret::new) })
}

fn host_port(text: &str) -> Result<(String, Option<u16>), UrlError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6.split_once(']').ok_or(UrlError::Host)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| UrlError::Host)?;
            let port = if port.is_empty() { None } else { port.strip_prefix(':') };
            (host, port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = match port {
        None => None,
        Some(port) => match port.parse::<u16>() {
            Ok(port) if 0 < port => Some(port),
            _ => return Err(UrlError::Port),
        },
    };
    let valid = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if host.is_empty() || !host.chars().all(valid) {
        return Err(UrlError::Host);
    }
    Ok((host.to_owned(), port))
}

fn pattern(rest: &str) -> Result<Pattern, UrlError> {
    let mut it = Pattern {
        width: 1280,
        height: 720,
        fps: (30, 1),
        frames: None,
        pattern: "smpte".to_owned(),
        format: "I420".to_owned(),
    };
    let query = rest.trim_start_matches('/').trim_start_matches('?');
    for pair in query.split('&').filter(|it| !it.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let bad = || UrlError::Pattern(format!("`{}` has no valid value", escaped(key)));
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| 0 < *n).ok_or_else(bad);
        let name = |text: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
            let whole = !text.is_empty() && text.chars().all(fine);
            whole.then(|| text.to_owned()).ok_or_else(bad)
        };
        match key {
            "size" => {
                let (width, height) = value.split_once('x').ok_or_else(bad)?;
                (it.width, it.height) = (number(width)?, number(height)?);
            }
            "fps" => {
                let (n, d) = value.split_once('/').unwrap_or((value, "1"));
                it.fps = (number(n)?, number(d)?);
            }
            "frames" => {
                it.frames = Some(
                    number(value)
                        .and_then(|n| if n <= i32::MAX as u32 { Ok(n) } else { Err(bad()) })?,
                )
            }
            "pattern" => it.pattern = name(value)?,
            "format" => it.format = name(value)?,
            _ => return Err(UrlError::Pattern(format!("unknown parameter `{}`", escaped(key)))),
        }
    }
    Ok(it)
}

/// `text` with its percent escapes taken out.
pub(crate) fn decode(text: &str) -> Result<String, UrlError> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|it| char::from(it).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => return Err(UrlError::Encoding),
        }
    }
    String::from_utf8(out).map_err(|_| UrlError::Encoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, shown: &str, password: Option<&str>) {
        let parsed = SourceUrl::parse(text).unwrap();
        assert_eq!(parsed.url.to_string(), shown, "{text}");
        assert_eq!(parsed.password.as_ref().map(Secret::expose), password, "{text}");
        assert!(!format!("{parsed:?}").contains("canary"), "{parsed:?}");
    }

    #[test]
    fn urls_are_printed_without_what_can_be_secret() {
        check("rtsp://cam/ch1", "rtsp://cam/ch1", None);
        check("RTSPS://cam:322", "rtsps://cam:322/", None);
        check("rtsp://u:canary@cam:554/a", "rtsp://cam:554/a", Some("canary"));
        check("rtsp://u.x:c%40%2f%3fanary@[::1]:8554/a", "rtsp://[::1]:8554/a", Some("c@/?anary"));
        check("rtsp://u:c@anary:@cam/a", "rtsp://cam/a", Some("c@anary:"));
        check("http://cam/v.mjpg?password=canary", "http://cam/v.mjpg?***", None);
        check("http://cam?token=canary", "http://cam/?***", None);
        check("rtsp://cam/user=a_password=canary_ch=1", "rtsp://cam/user=***", None);
        check("rtsp://user/canary@cam/", "rtsp://user/***@cam/", None);
        check("rtsp://user/canary?x@cam/", "rtsp://user/***?***", None);
        check("file:///a%20b.mp4", "file:/a b.mp4", None);
        check("clips/a.mp4", "file:clips/a.mp4", None);
        check("test:", "test:?size=1280x720&fps=30/1", None);
        check("test:?size=64x48&fps=30000/1001", "test:?size=64x48&fps=30000/1001", None);
    }

    #[test]
    fn the_location_keeps_path_and_query_and_drops_the_credentials() {
        let parsed = SourceUrl::parse("rtsps://u:p@cam:322/a?b=c").unwrap();
        let SourceUrl::Rtsp(remote) = parsed.url else { panic!("not rtsp") };
        assert_eq!(remote.location("rtsp").expose(), "rtsps://cam:322/a?b=c");
        assert_eq!(remote.port_or_default("rtsp"), 322);
    }

    #[test]
    fn what_signs_in_is_found_in_a_query_or_path_and_the_channel_is_not() {
        let check = |url: &str, expected: Option<&str>| {
            let parsed = SourceUrl::parse(url).unwrap().url;
            let found = parsed.remote().unwrap().0.signs_in();
            assert_eq!(found.as_ref().map(Secret::expose), expected, "{url}");
        };
        check("rtsp://nvr/cam?user=a&password=b&channel=1", Some("password=b&user=a"));
        check(
            "rtsp://nvr/user=a_password=b_c_channel=1.sdp?real_stream",
            Some("password=bc&user=a"),
        );
        check("http://cam/v.mjpg?Token=x", Some("Token=x"));
        check("http://cam/v?loginuse=x&loginpas=y", Some("loginpas=y&loginuse=x"));
        check("rtsp://cam/h264?subtype=1&channel=2", None);
    }

    #[test]
    fn bad_urls_are_refused_without_quoting_them() {
        for (text, expected) in [
            ("", UrlError::Empty),
            ("exec:canary", UrlError::Scheme("exec".to_owned())),
            ("rtsp://", UrlError::Host),
            ("rtsp:cam", UrlError::Host),
            ("rtsp://u:can/ary@cam/", UrlError::Ambiguous),
            ("rtsp://u:c@n/ary@cam/", UrlError::Ambiguous),
            ("rtsp://canary:12/x@cam/", UrlError::Ambiguous),
            ("rtsp://canary:/x@cam/", UrlError::Ambiguous),
            ("http://canary:8/x?y@cam/", UrlError::Ambiguous),
            ("rtsp://u:can ary@cam/", UrlError::Control),
            ("rtsp://u:can%ary@cam/", UrlError::Encoding),
            ("rtsp://cam:0/", UrlError::Port),
            ("file://host/a", UrlError::FileHost),
        ] {
            let error = SourceUrl::parse(text).unwrap_err();
            assert_eq!(error, expected, "{text}");
            assert!(!error.to_string().contains("ary"), "{error}");
        }
        for text in ["test:?size=0x1", "test:?fps=x", "test:?a=1", "test:?pattern=a!b"] {
            assert!(matches!(SourceUrl::parse(text), Err(UrlError::Pattern(_))), "{text}");
        }
    }

    #[test]
    fn the_name_of_a_file_cannot_steer_a_terminal() {
        let shown = SourceUrl::parse("file:///a%1b[2J%0a.mp4").unwrap().url.to_string();
        assert_eq!(shown, "file:/a\\u{1b}[2J\\n.mp4");
    }

    #[test]
    fn control_characters_of_a_camera_are_made_visible() {
        assert_eq!(escaped("a\u{1b}[31m\nb\u{202e}é"), "a\\u{1b}[31m\\nb\\u{202e}é");
    }
}
