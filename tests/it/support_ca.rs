//! A certificate authority of the tests' own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ghostwatch::sink::settings::Tls;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// Makes `ca.pem`, `server.pem` with `server.key` for 127.0.0.1, and a certificate for a client.
/// Gives what the client is set to.
pub(crate) fn certificates(folder: &Path) -> Tls {
    let write = |name: &str, text: String| -> PathBuf {
        let file = folder.join(name);
        fs::write(&file, text).unwrap();
        file
    };
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca_file = write("ca.pem", params.self_signed(&key).unwrap().pem());
    let ca = Issuer::new(params, key);
    let signed = |name: &str, host: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        // Named like the authority, it would be taken for one.
        params.distinguished_name.push(DnType::CommonName, name);
        let cert = params.signed_by(&key, &ca).unwrap();
        let cert = write(&format!("{name}.pem"), cert.pem());
        (cert, write(&format!("{name}.key"), key.serialize_pem()))
    };
    signed("server", "127.0.0.1");
    let (cert, key) = signed("client", "ghostwatch");
    Tls { ca_file: Some(ca_file), cert_file: Some(cert), key_file: Some(key) }
}
