//! Who may ask: the `Host` allow-list against DNS rebinding, and the token.

use std::{fmt, hint::black_box, net::IpAddr};

use hyper::{
    HeaderMap, Request,
    header::{AUTHORIZATION, HOST},
};
use sha2::{Digest as _, Sha256};

/// Shorter tokens can be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// A token that requests must bring. Only its hash is kept.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// Takes a token as read from a file; white space around it does not count.
    ///
    /// # Errors
    /// It is too short, or has characters that a header cannot carry.
    pub fn new(text: &str) -> anyhow::Result<Token> {
        let text = text.trim();
        anyhow::ensure!(
            TOKEN_BYTES_MIN <= text.len(),
            "the HTTP token has {} bytes, at least {TOKEN_BYTES_MIN} are needed: try \
             `openssl rand -hex 32`",
            text.len()
        );
        let plain = text.bytes().all(|it| it.is_ascii_graphic());
        anyhow::ensure!(plain, "the HTTP token has characters other than visible ASCII");
        Ok(Token(Sha256::digest(text).into()))
    }

    /// Compares hashes to the end, so that the time tells nothing about the token.
    fn is(&self, given: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(given).into();
        let differ = self.0.iter().zip(given).fold(0, |all, (a, b)| black_box(all | (a ^ b)));
        differ == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Who may ask.
#[derive(Clone, Debug)]
pub struct Access {
    token: Option<Token>,
    /// Lower case, without ports; IPv6 addresses in brackets.
    hosts: Vec<String>,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It names no host.
    NoHost,
    /// It names a host that is not ours.
    Host,
    /// It has no token, or a wrong one.
    Token,
}

impl Access {
    /// Lets in requests with `token`, if one is given, that name this machine's loopback or one of
    /// `hosts`, with any port.
    pub fn new(token: Option<Token>, hosts: &[String]) -> Access {
        let own = ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned);
        let hosts = hosts.iter().map(|it| without_port(it).to_ascii_lowercase());
        Access { token, hosts: own.into_iter().chain(hosts).collect() }
    }

    /// Whether requests need a token.
    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Lets in requests that name the address it listens on: a name that was rebound to it would
    /// still be a name.
    pub(crate) fn bound_to(mut self, ip: IpAddr) -> Access {
        if !ip.is_unspecified() {
            self.hosts.push(match ip {
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            });
        }
        self
    }

    pub(crate) fn check<B>(&self, request: &Request<B>) -> Result<(), Refused> {
        let mut hosts = request.headers().get_all(HOST).iter();
        let host = hosts.next().ok_or(Refused::NoHost)?;
        let named = [host.to_str().ok(), request.uri().authority().map(|it| it.as_str())];
        let ours = named.into_iter().flatten().all(|it| self.is_ours(it));
        if host.to_str().is_err() || hosts.next().is_some() || !ours {
            return Err(Refused::Host);
        }
        match &self.token {
            Some(token) if !brings(request.headers(), token) => Err(Refused::Token),
            _ => Ok(()),
        }
    }

    fn is_ours(&self, host: &str) -> bool {
        let host = without_port(host);
        self.hosts.iter().any(|it| it.eq_ignore_ascii_case(host))
    }
}

/// `host` of `host`, `host:port`, `[v6]` and `[v6]:port`. Anything else stays as it is, so that it
/// equals no host.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port))
            if port.bytes().all(|it| it.is_ascii_digit())
                && (!name.contains(':') || name.ends_with(']')) =>
        {
            name
        }
        _ => host,
    }
}

/// Whether the request has the token, as Bearer or as the password of Basic with any user name.
fn brings(headers: &HeaderMap, token: &Token) -> bool {
    let Some(Ok(given)) = headers.get(AUTHORIZATION).map(|it| it.to_str()) else { return false };
    let Some((scheme, given)) = given.split_once(' ') else { return false };
    let given = given.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return token.is(given.as_bytes());
    }
    let basic = scheme.eq_ignore_ascii_case("basic");
    let Some(pair) = basic.then(|| from_base64(given)).flatten() else { return false };
    let colon = pair.iter().position(|it| *it == b':');
    colon.is_some_and(|at| token.is(&pair[at + 1..]))
}

/// Bytes of base64 with the usual alphabet (RFC 4648 §4); `None` if it is not that.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let body = text.trim_end_matches('=');
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(body.len()), 0u32, 0u32);
    for it in body.bytes() {
        let value = match it {
            b'A'..=b'Z' => it - b'A',
            b'a'..=b'z' => it - b'a' + 26,
            b'0'..=b'9' => it - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        held = (held << 6 | u32::from(value)) & 0xffff;
        bits += 6;
        if 8 <= bits {
            bits -= 8;
            bytes.push((held >> bits) as u8);
        }
    }
    (text.len() - body.len() <= 2).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_as_in_rfc_4648() {
        let check = |text, want: Option<&str>| {
            assert_eq!(from_base64(text), want.map(|it| it.as_bytes().to_vec()), "{text}");
        };
        check("", Some(""));
        check("Zg==", Some("f"));
        check("Zm8=", Some("fo"));
        check("Zm9vYmFy", Some("foobar"));
        check("Zm9v!", None);
        check("Zg===", None);
    }

    #[test]
    fn only_listed_hosts_are_ours_with_any_port() {
        let access = Access::new(None, &["Cams.Example".to_owned()]);
        let access = access.bound_to(IpAddr::from([10, 0, 0, 1]));
        for host in
            ["localhost", "LOCALHOST:1", "127.0.0.1:9464", "[::1]", "[::1]:80", "10.0.0.1:1"]
        {
            assert!(access.is_ours(host), "{host}");
        }
        assert!(access.is_ours("cams.example:443"));
        let strange = ["", ":", "evil", "localhost.evil", "[::1", "::1", "localhost:x", "10.0.0.2"];
        for host in strange {
            assert!(!access.is_ours(host), "{host}");
        }
    }

    #[test]
    fn a_token_is_long_visible_and_never_printed() {
        assert!(Token::new("short").is_err());
        assert!(Token::new("spaces are refused").is_err());
        let token = Token::new(" 0123456789abcdef\n").unwrap();
        assert!(token.is(b"0123456789abcdef") && !token.is(b"0123456789abcdeg"));
        assert_eq!(format!("{token:?}"), "Token(…)");
    }
}
