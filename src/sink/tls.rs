//! TLS settings of a sink, read from their files anew at every connection: certificates get renewed
//! while the daemon runs.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, ensure};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::sink::broker::{Code, Fault, Tls};

/// What to trust and what to show, with the one cryptography that the program has.
///
/// # Errors
/// [`Code::Tls`] if a file cannot be read or has nothing of use in it.
pub fn client_config(tls: &Tls) -> Result<ClientConfig, Fault> {
    build(tls).map_err(|it| Fault::new(Code::Tls, it))
}

fn build(tls: &Tls) -> anyhow::Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("choosing TLS versions")?
        .with_root_certificates(roots(tls.ca_file.as_deref())?);
    let config = match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => {
            let shown = certificates(cert)?;
            let key = PrivateKeyDer::from_pem_file(key)
                .with_context(|| format!("reading the private key {}", key.display()))?;
            builder
                .with_client_auth_cert(shown, key)
                .with_context(|| format!("{} and its key", cert.display()))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(config)
}

fn roots(file: Option<&Path>) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(file) => {
            for it in certificates(file)? {
                roots.add(it).with_context(|| format!("{}", file.display()))?;
            }
        }
        None => {
            let system = rustls_native_certs::load_native_certs();
            // Single certificates of a system that rustls cannot read are not ours to mend.
            roots.add_parsable_certificates(system.certs);
            ensure!(
                !roots.is_empty(),
                "the system has no certificates to trust ({:?}); install ca-certificates or set ca_file",
                system.errors
            );
        }
    }
    Ok(roots)
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(file)?.collect::<Result<Vec<_>, _>>();
    let found = read().with_context(|| format!("reading certificates from {}", file.display()))?;
    ensure!(!found.is_empty(), "{} has no certificate in it", file.display());
    Ok(found)
}
