//! The standing receiver of a service: `--accept-migrations`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use api::Service;
use clap::Args;
use control::Migration;
use spec::AwaitMigration;

use crate::args::check_directories;
use crate::sandbox::Rule;

/// The endpoint at which a service accepts VMs from others.
#[derive(Debug, Args)]
#[command(next_help_heading = "Migration")]
pub(crate) struct AcceptArguments {
    /// Accept VMs from other services here, at any time and up to 8 at once: tcp:HOST:PORT or
    /// unix:PATH. Over TCP, --migration-peer and --accept-tls-dir (or --migration-insecure) say who
    /// may send a VM, --migration-allow and --migration-allow-tap what it may name.
    #[arg(long, value_name = "URL")]
    accept_migrations: Option<String>,
    /// Directory of the certificates for --accept-migrations: ca-cert.pem, server-cert.pem and
    /// server-key.pem.
    #[arg(long, value_name = "DIR", requires = "accept_migrations")]
    accept_tls_dir: Option<PathBuf>,
}

impl AcceptArguments {
    /// The rules by which the receiver finds its files.
    pub(crate) fn rules(&self) -> impl Iterator<Item = Rule> {
        let endpoint = self.accept_migrations.as_deref();
        let socket = endpoint.and_then(|endpoint| endpoint.strip_prefix("unix:"));
        // The folder and not the socket, which does not exist yet.
        let socket = socket.map(|path| Rule::maker_of(Path::new(path)));
        let certificates = self.accept_tls_dir.as_deref().map(Rule::reading);
        socket.into_iter().chain(certificates)
    }

    /// Checks the directory of certificates.
    pub(crate) fn check(&self) -> Result<()> {
        check_directories("--accept-tls-dir", &self.accept_tls_dir)
    }

    /// Begins to accept VMs, if the command line says where. To be called on the service's runtime.
    pub(crate) fn start(&self, service: &Service) -> Result<Option<Receiver>> {
        let Some(listen) = &self.accept_migrations else {
            return Ok(None);
        };
        let tls_dir = self.accept_tls_dir.as_ref();
        let what = AwaitMigration {
            tls_dir: tls_dir.map(|dir| dir.to_string_lossy().into_owned()),
            ..AwaitMigration::at(listen)
        };
        let receiver = service.accept_migrations(&what).map_err(|error| {
            // The detail of one field is in that of the error.
            let fields = error.fields.iter().filter(|_| error.fields.len() > 1);
            let fields: String = fields.map(|field| format!("; {}", field.detail)).collect();
            anyhow!("--accept-migrations {listen}: {}{fields}", error.detail)
        })?;
        eprintln!("whimbrel: VMs are accepted at {}", receiver.info().endpoint);
        Ok(Some(Receiver(receiver)))
    }
}

/// A receiver that accepts VMs.
pub(crate) struct Receiver(Arc<dyn Migration>);

impl Receiver {
    /// Accepts no more VMs, and returns when the endpoint is free. Those on their way stay.
    pub(crate) async fn stop(self) {
        if let Err(error) = self.0.cancel() {
            tracing::debug!(%error, "the receiver has ended by itself");
        }
        // The sender is part of the receiver, which is held here.
        let _ = self.0.settled().wait_for(|settled| *settled).await;
    }
}
