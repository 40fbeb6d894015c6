//! Events as lines: on standard output, for people or programs, and in a file.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use crate::{
    cli::text::{self, Clock},
    sink::{
        broker::{Acks, Broker, Code, Fault, Message},
        file::RotatingFile,
        settings::Rotation,
    },
};

/// Standard output.
pub struct Stdout {
    /// Lines for people with this clock, or NDJSON.
    pub text: Option<Clock>,
}

impl Broker for Stdout {
    async fn connect(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// A line is acknowledged once the operating system has it.
    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        let write = || -> io::Result<()> {
            let mut out = std::io::stdout().lock();
            for message in messages {
                match self.text {
                    Some(clock) => writeln!(out, "{}", text::event(&message.json, clock))?,
                    None => writeln!(out, "{}", message.json)?,
                }
            }
            out.flush()
        };
        write().map_err(|it| fault(it, "standard output"))?;
        messages.iter().for_each(|_| acks.next(false));
        Ok(())
    }

    async fn lost(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn close(&mut self) {}
}

/// A file that is moved aside when it has grown.
pub struct File {
    /// Where.
    pub path: PathBuf,
    /// How it grows.
    pub rotation: Rotation,
    /// `None` until it is opened.
    pub file: Option<RotatingFile>,
}

impl Broker for File {
    /// Opens it anew, because it may be what failed: its folder may be there again, or another disk.
    async fn connect(&mut self) -> Result<(), Fault> {
        self.file = None;
        let open = RotatingFile::open(&self.path, self.rotation);
        self.file = Some(open.map_err(|it| fault(it, &self.path.display().to_string()))?);
        Ok(())
    }

    /// A line is acknowledged once the operating system has it, or with `sync` the disk.
    async fn deliver(&mut self, messages: &[Message], acks: &mut Acks<'_>) -> Result<(), Fault> {
        let file = self.file.as_mut().expect("the loop connects before it delivers");
        let mut write = || -> io::Result<()> {
            for message in messages {
                file.write_line(&message.json)?;
            }
            file.flush()
        };
        write().map_err(|it| fault(it, &self.path.display().to_string()))?;
        messages.iter().for_each(|_| acks.next(false));
        Ok(())
    }

    async fn lost(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn close(&mut self) {}
}

fn fault(error: io::Error, what: &str) -> Fault {
    let code = match error.kind() {
        io::ErrorKind::BrokenPipe => Code::Closed,
        io::ErrorKind::PermissionDenied => Code::Auth,
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::Full,
        _ => Code::Error,
    };
    Fault::new(code, anyhow::Error::new(error).context(what.to_owned()))
}
