//! Certificates for the servers that tests start.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ghostwatch::sink::settings::Tls;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedKey, DnType, IsCa, Issuer, KeyPair,
    generate_simple_self_signed,
};
use sha2::{Digest, Sha256};

/// An authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate in PEM.
    pub(crate) pem: String,
}

/// A server's certificate.
pub(crate) struct Shown {
    /// The certificate in PEM.
    pub(crate) certificate: String,
    /// Its key in PEM.
    pub(crate) key: String,
    /// `sha256:` and the hash of the certificate in DER.
    pub(crate) fingerprint: String,
}

impl Shown {
    /// Certificate and key in one.
    pub(crate) fn pem(&self) -> String {
        format!("{}{}", self.certificate, self.key)
    }

    fn new(certificate: &rcgen::Certificate, key: &KeyPair) -> Shown {
        let hash = Sha256::digest(certificate.der());
        let hex: String = hash.iter().map(|it| format!("{it:02x}")).collect();
        Shown {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            fingerprint: format!("sha256:{hex}"),
        }
    }

    /// For `name`, signed by itself, as cameras come out of the box.
    pub(crate) fn by_itself(name: &str) -> Shown {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed([name.to_owned()]).unwrap();
        Shown::new(&cert, &signing_key)
    }
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "ghostwatch test authority");
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for the host `name`.
    pub(crate) fn sign(&self, name: &str) -> Shown {
        self.sign_for(&[name])
    }

    /// A certificate for several names of one host.
    pub(crate) fn sign_for(&self, names: &[&str]) -> Shown {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|it| (*it).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        // Named like the authority, it would be taken for one.
        params.distinguished_name.push(DnType::CommonName, "a host of a test");
        Shown::new(&params.signed_by(&key, &self.issuer).unwrap(), &key)
    }
}

/// An authority's certificate, and one of it for `localhost` and 127.0.0.1, in files.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Files {
    /// Writes them to `folder`.
    pub(crate) fn write(folder: &Path) -> Files {
        let authority = Authority::new();
        let (cert, key) =
            written(folder, "server", &authority.sign_for(&["localhost", "127.0.0.1"]));
        Files { ca: write(folder, "ca.pem", &authority.pem), cert, key }
    }
}

/// Makes `ca.pem`, `server.pem` with `server.key` for 127.0.0.1, and a certificate for a client.
/// Gives what the client is set to.
pub(crate) fn certificates(folder: &Path) -> Tls {
    let authority = Authority::new();
    let ca_file = write(folder, "ca.pem", &authority.pem);
    written(folder, "server", &authority.sign("127.0.0.1"));
    let (cert, key) = written(folder, "client", &authority.sign("ghostwatch"));
    Tls { ca_file: Some(ca_file), cert_file: Some(cert), key_file: Some(key) }
}

/// The files of a certificate and its key.
fn written(folder: &Path, name: &str, shown: &Shown) -> (PathBuf, PathBuf) {
    let cert = write(folder, &format!("{name}.pem"), &shown.certificate);
    (cert, write(folder, &format!("{name}.key"), &shown.key))
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let file = folder.join(name);
    fs::write(&file, text).unwrap();
    file
}
