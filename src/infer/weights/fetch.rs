//! The published checkpoint to a safetensors file of ours: downloaded or from a local file,
//! verified by its git blob id, converted.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use sha1::{Digest, Sha1};

use crate::infer::weights::{
    self, Checkpoint, FILE_MAX,
    atomic::Atomic,
    error::{Problem, WeightsError},
    hex, read_bytes,
};

/// Where the authors of GhostNet publish their checkpoint (73.98 % top-1).
pub const URL: &str = "https://github.com/huawei-noah/ghostnet/raw/master/ghostnet_pytorch/models/state_dict_73.98.pth";
/// Its git blob id: SHA-1 over `blob <length>\0` and the bytes.
pub const BLOB_ID: &str = "26da9f2807cd5ba95c607cec01ceb9700d94e0ae";

/// Bytes of a download; the published file has 21 MB.
const DOWNLOAD_MAX: u64 = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which a server is given up, before and between the bytes.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A checkpoint could not be fetched or imported. Nothing is left at the destination then.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection, or no answer.
    #[error(
        "cannot reach {url}; check the network and the proxy variables, give a mirror with --url, \
         or download the file elsewhere and use `weights import`"
    )]
    Connect {
        /// The address.
        url: String,
        /// What the HTTP client said.
        source: Box<ureq::Error>,
    },
    /// An answer, but not the file.
    #[error("{url} answered with status {status}; is the address right?")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The connection broke, or the server stopped early.
    #[error("the download of {url} was interrupted after {got} bytes; try again")]
    Interrupted {
        /// The address.
        url: String,
        /// Bytes that had come.
        got: u64,
        /// What the HTTP client said.
        source: io::Error,
    },
    /// More bytes than a checkpoint has.
    #[error("{url} gives more than {DOWNLOAD_MAX} bytes, which no checkpoint of GhostNet has")]
    TooLarge {
        /// The address.
        url: String,
    },
    /// Other bytes than the published ones.
    #[error(
        "{from} is not the published checkpoint: {length} bytes with git blob id {found} instead \
         of {expected}; a file of yours is imported with `weights import --name NAME`"
    )]
    WrongBytes {
        /// The address or file.
        from: String,
        /// Its length in bytes.
        length: u64,
        /// Its blob id.
        found: String,
        /// The published one's.
        expected: String,
    },
    /// Writing failed.
    #[error("cannot write {}{}", path.display(), hint(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file could not be read, or is no weights file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The caller's own check of the checkpoint failed.
    #[error("{from} was not taken over")]
    Refused {
        /// The address or file.
        from: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (no space is left: free some, 64 MiB are enough, and try again)"
        }
        _ => "",
    }
}

/// The last step before a checkpoint is written: the caller checks it against its network and
/// adds reference logits.
pub type Finish<'a> =
    &'a dyn Fn(&mut Checkpoint) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A file on the web with known content.
#[derive(Clone, Copy, Debug)]
pub struct Published<'a> {
    /// Its address, or that of a mirror.
    pub url: &'a str,
    /// Its git blob id, in lower-case hex.
    pub blob_id: &'a str,
}

/// Downloads a published checkpoint and writes it to `dest` as safetensors. Proxy variables of the
/// environment are honoured. `bar` shows the bytes; [`bar`] makes one.
///
/// # Errors
/// [`FetchError`]; nothing is left at `dest` or beside it then.
pub fn fetch(
    published: Published<'_>,
    dest: &Path,
    bar: &ProgressBar,
    finish: Finish<'_>,
) -> Result<Checkpoint, FetchError> {
    let url = published.url;
    let failed = |source| FetchError::Write { path: dest.to_owned(), source };
    // The name keeps the download apart from the safetensors file that is written later.
    let mut name = dest.file_name().unwrap_or_default().to_owned();
    name.push(".download");
    let download = Atomic::create(&dest.with_file_name(name)).map_err(failed)?;
    let length = receive(url, &mut download.file(), bar).map_err(|e| match e {
        Failure::Download(e) => e,
        Failure::Write(e) => failed(e),
    })?;
    bar.set_message("checking");
    let bytes = read_bytes(download.temporary(), DOWNLOAD_MAX)?;
    // Dropping it removes the download.
    drop(download);
    let found = blob_id(&bytes);
    if found != published.blob_id {
        let (from, expected) = (url.to_owned(), published.blob_id.to_owned());
        return Err(FetchError::WrongBytes { from, length, found, expected });
    }
    let origin = Origin { from: url, source: url, blob_id: &found, name: None };
    take_over(&bytes, &origin, dest, finish)
}

/// Takes a local file over: with no `name` only the published one, whose git blob id is given;
/// with a name any, marked `other`.
///
/// # Errors
/// [`FetchError`]; nothing is left at `dest` then.
pub fn import(
    path: &Path,
    dest: &Path,
    expected: &str,
    name: Option<&str>,
    finish: Finish<'_>,
) -> Result<Checkpoint, FetchError> {
    let bytes = read_bytes(path, FILE_MAX)?;
    let found = blob_id(&bytes);
    let from = path.display().to_string();
    if name.is_none() && found != expected {
        let (length, expected) = (bytes.len() as u64, expected.to_owned());
        return Err(FetchError::WrongBytes { from, length, found, expected });
    }
    // Only the file's own name is kept: where it lay is nobody's business.
    let source = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.filter(|_| found != expected);
    let origin = Origin { from: &from, source: &source, blob_id: &found, name };
    take_over(&bytes, &origin, dest, finish)
}

/// A progress bar on stderr; draws nothing where that is no terminal.
pub fn bar() -> ProgressBar {
    let style = "{msg} {bytes}/{total_bytes} {wide_bar} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(style).expect("the template is well formed");
    ProgressBar::no_length().with_style(style).with_message("fetching")
}

/// Git's id of a file's content.
pub fn blob_id(bytes: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", bytes.len()));
    hash.update(bytes);
    hex(&hash.finalize())
}

struct Origin<'a> {
    /// For messages.
    from: &'a str,
    /// For the metadata.
    source: &'a str,
    blob_id: &'a str,
    /// `None` iff it is the published checkpoint.
    name: Option<&'a str>,
}

fn take_over(
    bytes: &[u8],
    origin: &Origin<'_>,
    dest: &Path,
    finish: Finish<'_>,
) -> Result<Checkpoint, FetchError> {
    let content = |source: Problem| WeightsError::Content { path: origin.from.into(), source };
    let mut checkpoint = weights::parse(bytes, false).map_err(content)?;
    let provenance = &mut checkpoint.metadata.provenance;
    let kind = if origin.name.is_some() { "other" } else { "published" };
    provenance.insert("origin".into(), kind.into());
    provenance.insert("source".into(), origin.source.into());
    provenance.insert("source_git_blob".into(), origin.blob_id.into());
    provenance.insert("source_sha256".into(), checkpoint.sha256.clone());
    if let Some(name) = origin.name {
        provenance.insert("name".into(), name.into());
    }
    finish(&mut checkpoint)
        .map_err(|source| FetchError::Refused { from: origin.from.into(), source })?;
    checkpoint.sha256 = weights::write(dest, &checkpoint).map_err(|e| match e {
        WeightsError::Io { path, source, .. } => FetchError::Write { path, source },
        content => FetchError::Weights(content),
    })?;
    Ok(checkpoint)
}

/// The proxy of the environment, but none to this machine itself: a mirror on it is out of a
/// proxy's reach, and proxy variables seldom come with the exception.
fn proxy(url: &str) -> Option<ureq::Proxy> {
    let host = url.parse::<ureq::http::Uri>().ok()?.host()?.to_owned();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let local = host == "localhost" || address.is_ok_and(|it| it.is_loopback());
    if local { None } else { ureq::Proxy::try_from_env() }
}

enum Failure {
    Download(FetchError),
    Write(io::Error),
}

/// Copies the body of an address into a file; gives its length.
fn receive(url: &str, file: &mut &File, bar: &ProgressBar) -> Result<u64, Failure> {
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(SILENCE_MAX))
        .timeout_per_read(Some(SILENCE_MAX))
        .http_status_as_error(false)
        .proxy(proxy(url))
        .build();
    let answer = config.new_agent().get(url).call().map_err(|source| {
        Failure::Download(FetchError::Connect { url: url.into(), source: Box::new(source) })
    })?;
    let status = answer.status().as_u16();
    if status != 200 {
        return Err(Failure::Download(FetchError::Status { url: url.into(), status }));
    }
    let announced = answer.body().content_length();
    let too_large = || Failure::Download(FetchError::TooLarge { url: url.into() });
    if announced.is_some_and(|it| DOWNLOAD_MAX < it) {
        return Err(too_large());
    }
    if let Some(length) = announced {
        bar.set_length(length);
    }
    let mut body = answer.into_body().into_with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; 64 << 10];
    let mut got = 0;
    let interrupted =
        |got, source| Failure::Download(FetchError::Interrupted { url: url.into(), got, source });
    loop {
        let length = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(interrupted(got, e)),
        };
        got += length as u64;
        if DOWNLOAD_MAX < got {
            return Err(too_large());
        }
        file.write_all(&buffer[..length]).map_err(Failure::Write)?;
        bar.inc(length as u64);
    }
    match announced {
        Some(announced) if got < announced => {
            let what = format!("{announced} bytes were announced");
            Err(interrupted(got, io::Error::new(io::ErrorKind::UnexpectedEof, what)))
        }
        _ => Ok(got),
    }
}

#[cfg(test)]
mod tests;
