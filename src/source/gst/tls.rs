//! Whom a camera's certificate has to convince: authorities, or its own fingerprint.
//!
//! GStreamer hands `tls-database` to the connection only as a second opinion: what the system
//! trusts is accepted before anyone is asked. So the process's own default is a database that
//! trusts nobody, and each source brings its own.

use std::{
    fs::File,
    io::Write,
    os::fd::AsRawFd,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use gio::{SocketClientEvent, prelude::*};
use gstreamer as gst;
use rustix::fs::{MemfdFlags, memfd_create};
use sha2::{Digest, Sha256};

use crate::{
    frame::Code,
    source::{SourceError, Tls, fingerprint::Fingerprint, gst::shared::Shared},
};

/// A certificate for nobody: it was valid for a day, is no authority, and its key was never kept.
/// GIO makes no database without one.
const NOBODY: &str = "\
-----BEGIN CERTIFICATE-----
MIIBdTCCARqgAwIBAgIUGlT94Wppm1+bFIR20iV8ErScPCowCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGbm9ib2R5MB4XDTI2MTEyNDA4MTExMFoXDTI2MTEyNTA4MTEx
MFowETEPMA0GA1UEAwwGbm9ib2R5MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
FBAlbCJVNvMqqCdDn71Sjitag5EINPuf1uLHjivVgtf08XszUrUgZ5+m6grvr02s
aUNHaChFlV/h/guuHDkCcqNQME4wHQYDVR0OBBYEFMevZLU5xDxD9Hnkn4Mh/zNg
j8faMB8GA1UdIwQYMBaAFMevZLU5xDxD9Hnkn4Mh/zNgj8faMAwGA1UdEwEB/wQC
MAAwCgYIKoZIzj0EAwIDSQAwRgIhAJNW5zRBmnNG2d+kDlJiJGf032FNnnaKewwB
KRPm5oIWAiEAhewWQYFTC8X+JNGmg6tsvRYpwfUCWyMLzc4Cfd8wQuQ=
-----END CERTIFICATE-----
";

/// An element that is never started and keeps the system's authorities in its `tls-database`: the
/// bindings let an element go from thread to thread, but not the database itself. With it the file
/// behind the default database, which GIO reads again. `None` iff GIO has no TLS here.
static SYSTEM: OnceLock<Option<(gst::Element, File)>> = OnceLock::new();

/// Makes `source`, an element with `tls-database`, trust whom `tls` says and nobody else.
///
/// # Errors
/// There is no TLS here, or the file with the authorities cannot be read.
pub fn set_up(source: &gst::Element, tls: &Tls) -> Result<(), SourceError> {
    let system = system()?;
    if tls.fingerprint.is_some() {
        // No database: every certificate comes to `accept-certificate`.
        return Ok(());
    }
    let database = match &tls.ca_file {
        Some(path) => trusted(path)?,
        None => system.property("tls-database"),
    };
    source.set_property("tls-database", database);
    Ok(())
}

/// Lets an rtspsrc accept the certificate with this fingerprint.
pub fn pin(source: &gst::Element, fingerprint: Fingerprint, shared: &Arc<Shared>) {
    let shared = shared.clone();
    source.connect("accept-certificate", false, move |values| {
        let certificate = values.get(2).and_then(|it| it.get::<gio::TlsCertificate>().ok());
        let der = certificate.and_then(|it| it.certificate());
        let found = der.map(|it| Fingerprint(Sha256::digest(&it).into()));
        if found != Some(fingerprint) {
            let found = found.map_or_else(|| "none".to_owned(), |it| it.to_string());
            let detail = format!(
                "the certificate's fingerprint is {found}, but tls.fingerprint is {fingerprint}"
            );
            shared.fail(Code::Tls, detail);
        }
        Some((found == Some(fingerprint)).to_value())
    });
}

/// Agrees on TLS with a server once, as the stream would. Why it or we refuse; `None` if that
/// succeeds, or if something else is in the way.
pub fn refused((host, port): (&str, u16), tls: &Tls, most: Duration) -> Option<String> {
    let database = match &tls.ca_file {
        Some(path) => trusted(path).ok()?,
        None => system().ok()?.property("tls-database"),
    };
    let client = gio::SocketClient::new();
    client.set_tls(true);
    client.set_timeout(u32::try_from(most.as_secs()).unwrap_or(1).max(1));
    // Whose fingerprint is wanted was compared by `pin`, and whoever is not verified convinces.
    let any = !tls.verify || tls.fingerprint.is_some();
    let began = Arc::new(AtomicBool::new(false));
    let in_handshake = began.clone();
    client.connect_event(move |_, event, _, connection| {
        let connection = connection.and_then(|it| it.downcast_ref::<gio::TlsConnection>());
        let Some(connection) = connection.filter(|_| event == SocketClientEvent::TlsHandshaking)
        else {
            return;
        };
        in_handshake.store(true, Relaxed);
        connection.set_database(Some(&database));
        connection.connect_accept_certificate(move |_, _, _| any);
    });
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let error = client.connect_to_host(&host, port, gio::Cancellable::NONE).err()?;
    // A server that does not speak TLS answers with something else, or hangs up.
    let by_tls = error.is::<gio::TlsError>() || !error.matches(gio::IOErrorEnum::TimedOut);
    (began.load(Relaxed) && by_tls).then(|| error.message().to_owned())
}

fn system() -> Result<&'static gst::Element, SourceError> {
    let kept = SYSTEM.get_or_init(|| {
        let backend = gio::TlsBackend::default();
        let keeper = gst::ElementFactory::make("rtspsrc").build().ok()?;
        let (nobody, file) = nobody().ok()?;
        keeper.set_property("tls-database", backend.default_database());
        backend.set_default_database(Some(&nobody));
        Some((keeper, file))
    });
    kept.as_ref().map(|it| &it.0).ok_or_else(|| SourceError {
        code: Code::Tls,
        detail: "GLib has no TLS here; is the package glib-networking installed?".to_owned(),
    })
}

/// A database that trusts nobody, and its file.
fn nobody() -> anyhow::Result<(gio::TlsFileDatabase, File)> {
    let mut file = File::from(memfd_create("nobody.pem", MemfdFlags::CLOEXEC)?);
    file.write_all(NOBODY.as_bytes())?;
    let database = gio::TlsFileDatabase::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok((database, file))
}

fn trusted(path: &Path) -> Result<gio::TlsDatabase, SourceError> {
    // GIO takes absolute names only.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    gio::TlsFileDatabase::new(&path).map(|it| it.upcast()).map_err(|error| SourceError {
        code: Code::Tls,
        detail: format!("tls.ca_file {}: {error}", path.display()),
    })
}
