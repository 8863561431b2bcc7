//! The options of migrations.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use vmm::MigrationTrust;

use super::check_directories;

/// Permissions for migrations, used where a request gives none.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Migration")]
pub(crate) struct MigrationArguments {
    /// Folder or file below which a VM that arrives over TCP may name files and sockets. Can be
    /// repeated, and the path need not exist yet. By default none. A VM that arrives over a unix
    /// socket, to which only this user can connect, may name all.
    #[arg(long, value_name = "PATH")]
    migration_allow: Vec<PathBuf>,
    /// Tap that a VM which arrives over TCP may use; a * at the end matches any rest of the name
    /// (vmtap* matches new taps). Can be repeated.
    #[arg(long, value_name = "NAME")]
    migration_allow_tap: Vec<String>,
    /// Directory in which images are made for disks that come with a VM (`migrate --storage copy`). By
    /// default none, and such a VM is refused.
    #[arg(long, value_name = "DIR")]
    pub(crate) migration_storage: Option<PathBuf>,
    /// Host that may send VMs over TLS: a name or address in its certificate, or * for every host
    /// whose certificate the CA signed. Can be repeated.
    #[arg(long, value_name = "NAME")]
    migration_peer: Vec<String>,
    /// Allow migration over TCP without TLS, in both directions: anyone on the network path can
    /// read and change the memory of guests, and anyone who can connect can send a VM.
    #[arg(long)]
    migration_insecure: bool,
}

impl MigrationArguments {
    pub(crate) fn trust(&self) -> Result<MigrationTrust> {
        let allow = self
            .migration_allow
            .iter()
            .map(|path| ("--migration-allow", path));
        let storage = self
            .migration_storage
            .iter()
            .map(|path| ("--migration-storage", path));
        for (option, path) in allow.chain(storage) {
            // The service's working directory is not the operator's, and a relative path would
            // permit something else.
            if !path.is_absolute() {
                bail!("{option} {}: the path must be absolute", path.display());
            }
        }
        // Here, and not when the first VM has come. What a VM may name, on the other hand, may be made later.
        check_directories("--migration-storage", &self.migration_storage)?;
        Ok(MigrationTrust {
            storage: self.migration_storage.clone(),
            allow: self.migration_allow.clone(),
            allow_taps: self.migration_allow_tap.clone(),
            insecure: self.migration_insecure,
            tls_peers: self.migration_peer.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Arguments, Command};
    use super::*;

    #[test]
    fn migration_options_reach_every_service() {
        let options = "--migration-allow /images --migration-peer host-a --migration-insecure \
                       --migration-storage /tmp";
        for line in ["whimbrel serve", "whimbrel --api-socket /s"] {
            let line = format!("{line} {options}");
            let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
            let migration = match arguments.command {
                Some(Command::Serve(serve)) => serve.migration,
                _ => arguments.vm.migration,
            };
            let trust = migration.trust().unwrap();
            assert_eq!(trust.allow, [PathBuf::from("/images")]);
            assert_eq!(trust.storage, Some(PathBuf::from("/tmp")));
            assert!(trust.insecure && trust.tls_peers == ["host-a"]);
        }
        let relative = MigrationArguments {
            migration_allow: vec!["images".into()],
            ..MigrationArguments::default()
        };
        assert!(relative.trust().is_err());
        let relative = MigrationArguments {
            migration_storage: Some("new".into()),
            ..MigrationArguments::default()
        };
        assert!(relative.trust().is_err());
        let absent = MigrationArguments {
            migration_storage: Some("/nowhere/new".into()),
            ..MigrationArguments::default()
        };
        let why = absent.trust().unwrap_err().to_string();
        assert!(why.contains("--migration-storage /nowhere/new"), "{why}");
    }
}
