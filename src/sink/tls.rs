//! Connections of the sinks: a name, TCP, and TLS on it, each with the [`Code`] of its failure.

use std::{error::Error, io, path::Path, sync::Arc};

use anyhow::{Context as _, anyhow};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
};
use tokio_rustls::TlsConnector;

use crate::sink::{
    broker::{Code, Fault},
    settings::Tls,
};

/// A connection, with TLS or without.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What `tls` says, in the words of rustls. Reads its files anew, so that a certificate that was
/// renewed is found at the next connection.
pub(crate) fn client_config(tls: &Tls) -> Result<ClientConfig, Fault> {
    config(tls).map_err(|error| Fault::new(Code::Tls, error))
}

fn config(tls: &Tls) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match &tls.ca_file {
        Some(path) => {
            for it in certificates(path)? {
                let bad = || format!("{} holds a certificate that cannot be used", path.display());
                roots.add(it).with_context(bad)?;
            }
        }
        // One bad file among the system's is no reason to trust nobody.
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
    }
    if roots.is_empty() {
        return Err(anyhow!("no certificate is trusted: the system has none; name a `ca_file`"));
    }
    // The provider is named, because a process may have only one default and a library that
    // brings another would make rustls panic.
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let (Some(cert), Some(key)) = (&tls.cert_file, &tls.key_file) else {
        return Ok(config.with_no_client_auth());
    };
    let secret = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("reading the private key {}", key.display()))?;
    config
        .with_client_auth_cert(certificates(cert)?, secret)
        .with_context(|| format!("{} and {} do not fit", cert.display(), key.display()))
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    let found = read().with_context(|| format!("reading certificates of {}", path.display()))?;
    if found.is_empty() {
        return Err(anyhow!("{} holds no certificate in PEM", path.display()));
    }
    Ok(found)
}

/// Connects to `host`; the caller bounds the time.
pub(crate) async fn connect(
    host: &str,
    port: u16,
    tls: Option<&Tls>,
) -> Result<Box<dyn Stream>, Fault> {
    let place = format!("{host}:{port}");
    // The brackets of an address of IPv6 belong to the URL, not to the name.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let config = tls.map(client_config).transpose()?;
    let addresses = lookup_host((host, port)).await.map_err(|error| {
        Fault::new(Code::Dns, anyhow!(error).context(format!("looking up {host}")))
    })?;
    let mut last = Fault::new(Code::Dns, anyhow!("{host} has no address"));
    let mut tcp = None;
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(it) => {
                tcp = Some(it);
                break;
            }
            Err(error) => last = fault(error, &format!("connecting to {place}")),
        }
    }
    let Some(tcp) = tcp else { return Err(last) };
    tcp.set_nodelay(true).map_err(|error| fault(error, &place))?;
    let Some(config) = config else { return Ok(Box::new(tcp)) };
    let name = ServerName::try_from(host.to_owned()).map_err(|error| {
        Fault::new(Code::Tls, anyhow!(error).context(format!("{host} is no name for TLS")))
    })?;
    let connected = TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
    connected.map(|it| Box::new(it) as _).map_err(|error| fault(error, &format!("TLS to {place}")))
}

/// A failure with the code of its cause.
pub(crate) fn fault(error: impl Error + Send + Sync + 'static, doing: &str) -> Fault {
    Fault::new(code(&error), anyhow!(error).context(doing.to_owned()))
}

/// The code of the first cause that has one.
pub(crate) fn code(error: &(dyn Error + 'static)) -> Code {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<rustls::Error>() {
            return Code::Tls;
        }
        if let Some(io) = error.downcast_ref::<io::Error>() {
            match io.kind() {
                io::ErrorKind::ConnectionRefused => return Code::Refused,
                io::ErrorKind::TimedOut => return Code::Timeout,
                _ => (),
            }
            // The source of an `io::Error` is not the error in it but that one's source.
            if let Some(inner) = io.get_ref() {
                next = Some(inner);
                continue;
            }
        }
        next = error.source();
    }
    Code::Error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_of_a_failure_gives_its_code() {
        let tls = io::Error::other(rustls::Error::HandshakeNotComplete);
        assert_eq!(code(&io::Error::other(tls)), Code::Tls);
        assert_eq!(code(&io::Error::from(io::ErrorKind::ConnectionRefused)), Code::Refused);
        assert_eq!(code(&io::Error::other("something")), Code::Error);
    }

    #[test]
    fn a_file_that_is_not_there_or_holds_nothing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let tls = Tls { ca_file: Some(path.clone()), ..Tls::default() };
        let said = client_config(&tls).unwrap_err().to_string();
        assert!(
            said.starts_with("tls: reading certificates of ") && said.contains("ca.pem"),
            "{said}"
        );
        std::fs::write(&path, "nothing").unwrap();
        let said = client_config(&tls).unwrap_err().to_string();
        assert!(said.contains("ca.pem holds no certificate"), "{said}");
    }
}
