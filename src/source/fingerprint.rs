//! The fingerprint of a certificate, as it is written and compared. Pure.

use std::fmt;

/// SHA-256 of a certificate in DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Reads `sha256:` and 64 hex digits, in pairs with a colon between them or not.
    pub fn parse(text: &str) -> Option<Fingerprint> {
        let digits = text.strip_prefix("sha256:")?;
        let separator = if digits.contains(':') { ":" } else { "" };
        let wanted = 64 + 31 * separator.len();
        if digits.len() != wanted || !digits.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = i * (2 + separator.len());
            if 0 < i && !digits[..at].ends_with(separator) {
                return None;
            }
            let digit = |at: usize| char::from(digits.as_bytes()[at]).to_digit(16);
            *byte = (digit(at)? * 16 + digit(at + 1)?) as u8;
        }
        Some(Fingerprint(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|it| write!(f, "{it:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_read_with_and_without_colons_and_printed_without() {
        let plain = format!("sha256:{}", "0aB1".repeat(16));
        let colons = format!("sha256:{}", vec!["0A:b1"; 16].join(":"));
        for text in [&plain, &colons] {
            assert_eq!(Fingerprint::parse(text).unwrap().to_string(), plain.to_lowercase());
        }
        for wrong in [
            "",
            "sha256:",
            &plain[7..],
            &plain[..70],
            &format!("{plain}0"),
            &colons.replacen(':', "", 3),
            &colons.replace("b1:", "b1-"),
            &plain.replace('B', "x"),
            &plain.replace("sha256", "sha1"),
        ] {
            assert_eq!(Fingerprint::parse(wrong), None, "{wrong}");
        }
    }
}
