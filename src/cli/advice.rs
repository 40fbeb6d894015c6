//! What to do about a stream that failed: one sentence per code, as the README has it.

use crate::frame::Code;

/// What to do about a failure with this code.
pub fn advice(code: Code) -> &'static str {
    match code {
        Code::Auth => {
            "check user name and password with a player; some cameras lock an account for minutes, and some let a user see only some channels"
        }
        Code::Tls => {
            "check that the port speaks TLS; for a self-signed certificate set tls.fingerprint or tls.ca_file"
        }
        Code::Timeout => {
            "check address, port and firewall; if the camera answers others, try transport: tcp"
        }
        Code::Dns => "check the host name, or use the address",
        Code::Refused => "check the port, and that RTSP or HTTP is switched on in the camera",
        Code::NotFound => "check the path of the URL: each maker has its own",
        Code::Codec => {
            "set the camera to H.264 or H.265, and see `ghostwatch doctor` for the decoders that are here"
        }
        Code::Eos => "the server ends the stream: check its limit of clients, or what it plays",
        Code::Stall => {
            "pictures stopped though the connection stands: check the network, and the camera's load and bit rate"
        }
        Code::Error => {
            "see the lines that GStreamer said; GST_DEBUG=3 with `ghostwatch run` gives more"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_says_the_same_of_every_code() {
        let readme = include_str!("../../README.md");
        for code in Code::ALL {
            let row = format!("| `{}` | {} |", code.name(), advice(code));
            assert!(readme.contains(&row), "not in README.md: {row}");
        }
    }
}
