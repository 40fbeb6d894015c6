//! Certificates for the servers that tests start.

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
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        Shown::new(&params.signed_by(&key, &self.issuer).unwrap(), &key)
    }
}
