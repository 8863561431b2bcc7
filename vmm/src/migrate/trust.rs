//! The trust in a peer: what an offer may name of this host, and over which connections it may come.
//!
//! An offer holds a configuration, and a configuration names files, sockets and taps. A peer that
//! can
//! connect to an endpoint could therefore have any file of this host opened as a disk. So a peer has
//! the rights that its endpoint gives it:
//!
//! ```text
//!  unix socket      only this user can connect: the peer may name what this user may
//!  TCP with TLS     a host in whose name the operator trusts: below the allowed folders
//!  TCP without      anyone: only if the operator said so, and below the allowed folders
//! ```

use std::fs::Metadata;
use std::io;
use std::path::{Component, Path, PathBuf};

use control::{Category, RequestError};
use devices::host_file::FileKind;
use migration::{Endpoint, PeerNames, Refusal};
use spec::{AwaitMigration, NamedPath, PathUse, VmConfig};

use super::invalid;
use super::storage::{PlannedImage, storage_directory};

/// The name of the taps that are made for interfaces without one, as a pattern sees it.
const UNNAMED_TAP: &str = "vmtap";

/// Permissions for migrations from the operator of this process, used where a request gives none.
#[derive(Clone, Debug, Default)]
pub struct MigrationTrust {
    /// Folders and files below which a VM that comes over TCP may name paths. Absolute.
    pub allow: Vec<PathBuf>,
    /// Taps that a VM which comes over TCP may use; a `*` at the end stands for any ending.
    pub allow_taps: Vec<String>,
    /// Directory for the images of disks that come with a VM. Absolute.
    pub storage: Option<PathBuf>,
    /// TCP without TLS is allowed, in both directions.
    pub insecure: bool,
    /// Hosts that may send over TLS, by the names in their certificates.
    pub tls_peers: Vec<String>,
}

impl MigrationTrust {
    /// Refuses TCP without TLS, unless the request or the operator of this process allows it.
    pub(super) fn check_plaintext(
        &self,
        endpoint: &Endpoint,
        has_tls: bool,
        insecure: bool,
    ) -> Result<(), RequestError> {
        if matches!(endpoint, Endpoint::Unix(_)) || has_tls || insecure || self.insecure {
            return Ok(());
        }
        let detail = format!(
            "{endpoint} without TLS is neither encrypted nor authenticated: set `tls_dir` \
             (`--tls-dir`; at the start of a service that accepts migrations `--accept-tls-dir`), or \
             allow it with `insecure` (`--insecure`; for all migrations of this service \
             `--migration-insecure`)"
        );
        let code = "plaintext-refused";
        Err(RequestError::new(Category::Unprocessable, code, detail))
    }

    /// The hosts that may send over TLS.
    pub(super) fn peers(&self, what: &AwaitMigration) -> Result<PeerNames, RequestError> {
        let names = what.tls_peers.as_ref().unwrap_or(&self.tls_peers);
        PeerNames::new(names).map_err(|error| {
            let how =
                "`tls_peers` (`--tls-peer`; for all migrations of this service `--migration-peer`)";
            invalid("tls_peers", format!("{error}: {how}"))
        })
    }

    /// Returns the host resources that a peer of this endpoint may name.
    pub(super) fn allowed(
        &self,
        endpoint: &Endpoint,
        what: &AwaitMigration,
    ) -> Result<Allowed, RequestError> {
        let own = matches!(endpoint, Endpoint::Unix(_));
        let paths = match &what.allow {
            Some(paths) => Some(paths.iter().map(PathBuf::from).collect()),
            None if own => None,
            None => Some(self.allow.clone()),
        };
        if let Some(relative) = paths
            .iter()
            .flatten()
            .find(|path: &&PathBuf| !path.is_absolute())
        {
            let detail = format!("{} is not an absolute path", relative.display());
            return Err(invalid("allow", detail));
        }
        let taps = match &what.allow_taps {
            Some(taps) => Some(taps.clone()),
            None if own => None,
            None => Some(self.allow_taps.clone()),
        };
        let storage = what.storage.as_ref().map(PathBuf::from);
        let is_named = storage.is_some();
        let storage = storage.or_else(|| self.storage.clone());
        if let Some(relative) = storage.as_ref().filter(|path| !path.is_absolute()) {
            let detail = format!("{} is not an absolute path", relative.display());
            return Err(invalid("storage", detail));
        }
        if is_named {
            storage_directory(storage.as_deref()).map_err(|why| invalid("storage", why.detail))?;
        }
        Ok(Allowed {
            paths,
            taps,
            storage,
        })
    }
}

/// Host resources that an offer may name; all where there is no list.
#[derive(Clone, Debug)]
pub(super) struct Allowed {
    paths: Option<Vec<PathBuf>>,
    taps: Option<Vec<String>>,
    /// The directory for images of disks that come with a VM.
    storage: Option<PathBuf>,
}

impl Allowed {
    /// Everything that this process may use.
    pub(super) fn all() -> Self {
        Self {
            paths: None,
            taps: None,
            storage: None,
        }
    }

    pub(super) fn storage(&self) -> Option<&Path> {
        self.storage.as_deref()
    }

    /// Checks every path and every tap that a configuration names, and opens none of them. Returns the
    /// configuration with its paths resolved: a machine that is built of it opens the files that were
    /// checked, though a link on the way changes in between. The paths of images that are to be made are
    /// this side's own.
    pub(super) fn check(
        &self,
        config: &VmConfig,
        made: &[PlannedImage],
    ) -> Result<VmConfig, Refusal> {
        let unwritable = |error| Refusal::new("offer-unreadable", format!("{error}"));
        let mut resolved = serde_json::to_value(config).map_err(unwritable)?;
        let is_made = |pointer: &str| made.iter().any(|image| image.pointer == pointer);
        for named in config.paths() {
            if is_made(&named.pointer) {
                continue;
            }
            let place = self.check_path(&named)?;
            let Some(place) = place.to_str() else {
                return Err(unusable(&named, "it resolves to a path that is not UTF-8"));
            };
            if let Some(field) = resolved.pointer_mut(&named.pointer) {
                *field = place.into();
            }
        }
        for (index, net) in config.net.iter().flatten().enumerate() {
            // Descriptors come from whoever asked for the guest, and name nothing of this host.
            if net.tap_descriptors().is_some() {
                continue;
            }
            self.check_tap(index, net.tap.as_deref())?;
        }
        serde_json::from_value(resolved).map_err(unwritable)
    }

    fn check_path(&self, named: &NamedPath<'_>) -> Result<PathBuf, Refusal> {
        let path = Path::new(named.path);
        let resolved = resolve(path, named.used);
        // The host's source of random numbers is harmless, and in no allowed folder.
        let is_random = named.pointer == "/rng/src"
            && matches!(&resolved, Ok((_, Some(found))) if FileKind::of(found) == FileKind::Random);
        let is_allowed = match &resolved {
            Ok((resolved, _)) => self.is_below(resolved),
            // A peer does not learn what exists outside of the folders.
            Err(_) => {
                self.is_below(path) && path.components().all(|part| part != Component::ParentDir)
            }
        };
        if !is_allowed && !is_random {
            let detail = format!(
                "`{}` names {}, which is not below a folder that the destination allows: its \
                 operator allows one with `receive --allow` (`allow`), or `--migration-allow` of \
                 the service",
                field(named),
                named.path
            );
            return Err(Refusal::new("path-not-allowed", detail));
        }
        let (resolved, found) = resolved.map_err(|error| unusable(named, &error.to_string()))?;
        check_kind(named, found.as_ref())?;
        Ok(resolved)
    }

    /// Whether a peer may name this path, which is resolved.
    pub(super) fn is_below(&self, path: &Path) -> bool {
        let Some(allowed) = &self.paths else {
            return true;
        };
        allowed.iter().any(|allowed| {
            // The operator may name a folder by a link, as volume managers name their devices.
            let resolved = allowed.canonicalize();
            path.starts_with(resolved.as_deref().unwrap_or(allowed))
        })
    }

    fn check_tap(&self, index: usize, tap: Option<&str>) -> Result<(), Refusal> {
        let Some(allowed) = &self.taps else {
            return Ok(());
        };
        let name = tap.unwrap_or(UNNAMED_TAP);
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => tap.is_some() && name == pattern,
        };
        if allowed.iter().any(fits) {
            return Ok(());
        }
        let what = match tap {
            Some(tap) => format!("names the tap {tap}"),
            None => format!("needs a new tap ({UNNAMED_TAP}*)"),
        };
        let detail = format!(
            "`net.{index}` {what}, which the destination does not allow: its operator allows one \
             with `receive --allow-tap` (`allow_taps`), or `--migration-allow-tap` of the service"
        );
        Err(Refusal::new("tap-not-allowed", detail))
    }
}

/// Resolves a path through all links, and reads what is there.
fn resolve(path: &Path, used: PathUse) -> io::Result<(PathBuf, Option<Metadata>)> {
    let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let beside = || -> io::Result<PathBuf> {
        let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "it does not name a file");
        let (parent, name) = path.parent().zip(path.file_name()).ok_or_else(no_name)?;
        Ok(parent.canonicalize()?.join(name))
    };
    match used {
        // A socket takes the place of what is there, be it a link.
        PathUse::Listen => {
            let place = beside()?;
            let found = place.symlink_metadata();
            let found = found.map(Some).or_else(|error| match absent(&error) {
                true => Ok(None),
                false => Err(error),
            })?;
            Ok((place, found))
        }
        PathUse::Create => match path.canonicalize() {
            Ok(place) => {
                let found = place.metadata()?;
                Ok((place, Some(found)))
            }
            Err(error) if absent(&error) => {
                let place = beside()?;
                // A link that leads nowhere would have a file made where it leads.
                match place.symlink_metadata() {
                    Err(error) if absent(&error) => Ok((place, None)),
                    Ok(_) => Err(io::Error::new(
                        io::ErrorKind::NotFound,
                        "it is a broken link",
                    )),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        },
        PathUse::Read | PathUse::Write | PathUse::Connect => {
            let place = path.canonicalize()?;
            let found = place.metadata()?;
            Ok((place, Some(found)))
        }
    }
}

/// Refuses what the use of a path cannot open. The user opens it, and checks again.
fn check_kind(named: &NamedPath<'_>, found: Option<&Metadata>) -> Result<(), Refusal> {
    use FileKind::{BlockDevice, Null, Random, Regular, Socket, Terminal};
    let Some(found) = found.map(FileKind::of) else {
        return Ok(());
    };
    let takes: &[FileKind] = match named.used {
        PathUse::Listen | PathUse::Connect => &[Socket],
        PathUse::Create => &[Regular, Null, Terminal],
        PathUse::Read | PathUse::Write => &[Regular, BlockDevice, Random],
    };
    match takes.contains(&found) {
        true => Ok(()),
        false => Err(unusable(named, &format!("it is {}", found.name()))),
    }
}

fn unusable(named: &NamedPath<'_>, why: &str) -> Refusal {
    let is_payload = named.pointer.starts_with("/payload");
    let detail = format!(
        "`{}` names {}, which cannot be used on this host: {why}",
        field(named),
        named.path
    );
    match is_payload {
        // The guest could not be rebooted.
        true => Refusal::new("payload-missing", detail),
        false => Refusal::new("path-unusable", detail),
    }
}

/// `disks.0.path`, of `/disks/0/path`.
fn field(named: &NamedPath<'_>) -> String {
    named.pointer.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for dir in ["in", "in/deeper", "out"] {
                fs::create_dir(place.at(dir)).unwrap();
            }
            for file in ["in/disk", "in/kernel", "out/disk", "out/kernel"] {
                fs::write(place.at(file), "x").unwrap();
            }
            place
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn config(&self, body: &str) -> VmConfig {
            let body = body.replace('@', self.0.path().to_str().unwrap());
            spec::parse(body.as_bytes()).unwrap()
        }

        fn check(&self, allow: &[&str], body: &str) -> Result<VmConfig, Refusal> {
            let what = AwaitMigration {
                allow: Some(
                    allow
                        .iter()
                        .map(|name| self.at(name).to_string_lossy().into_owned())
                        .collect(),
                ),
                ..AwaitMigration::at("")
            };
            let tcp = Endpoint::Tcp("h:1".to_owned());
            let allowed = MigrationTrust::default().allowed(&tcp, &what).unwrap();
            allowed.check(&self.config(body), &[])
        }

        fn code(&self, body: &str) -> String {
            match self.check(&["in"], body) {
                Ok(_) => "fine".to_owned(),
                Err(why) => why.code,
            }
        }
    }

    #[test]
    fn each_path_must_be_below_an_allowed_folder() {
        let place = Place::new();
        let bodies = [
            r#"{"payload":{"kernel":"@/X/kernel"}}"#,
            r#"{"payload":{"initramfs":"@/X/kernel"}}"#,
            r#"{"payload":{},"disks":[{"path":"@/X/disk"}]}"#,
            r#"{"payload":{},"disks":[{"path":"@/in/deeper/../../X/disk"}]}"#,
            r#"{"payload":{},"serial":{"mode":"File","file":"@/X/log"}}"#,
            r#"{"payload":{},"console":{"mode":"File","file":"@/X/log"}}"#,
            r#"{"payload":{},"serial":{"mode":"Socket","socket":"@/X/serial"}}"#,
            r#"{"payload":{},"vsock":{"cid":3,"socket":"@/X/vsock"}}"#,
            r#"{"payload":{},"rng":{"src":"@/X/disk"}}"#,
        ];
        for body in bodies {
            assert_eq!(place.code(&body.replace('X', "in")), "fine", "{body}");
            let outside = body.replace('X', "out");
            assert_eq!(place.code(&outside), "path-not-allowed", "{body}");
            // Absent outside is no other answer than present outside.
            let absent = outside
                .replace("/disk\"", "/none\"")
                .replace("/kernel\"", "/none\"");
            assert_eq!(place.code(&absent), "path-not-allowed", "{absent}");
        }
        let told = place.check(&["in"], r#"{"payload":{"kernel":"@/out/kernel"}}"#);
        let told = told.unwrap_err().detail;
        for part in ["payload.kernel", "/out/kernel", "--migration-allow"] {
            assert!(told.contains(part), "{told}");
        }
        // A file can be allowed, too, and a folder by a link.
        let body = r#"{"payload":{},"disks":[{"path":"@/in/disk"}]}"#;
        symlink(place.at("in"), place.at("link")).unwrap();
        for allow in ["in/disk", "link", "link/disk"] {
            assert!(place.check(&[allow], body).is_ok(), "{allow}");
        }
        assert!(place.check(&["in/dis"], body).is_err());
        assert!(place.check(&[], body).is_err());
        // The default of every configuration.
        assert_eq!(place.code(r#"{"payload":{}}"#), "fine");
    }

    #[test]
    fn links_are_resolved_before_check() {
        let place = Place::new();
        symlink(place.at("out/disk"), place.at("in/link")).unwrap();
        symlink(place.at("out"), place.at("in/folder")).unwrap();
        symlink(place.at("out/new"), place.at("in/broken")).unwrap();
        symlink(place.at("in/disk"), place.at("out/back")).unwrap();
        let refused = [
            r#"{"payload":{},"disks":[{"path":"@/in/link"}]}"#,
            r#"{"payload":{},"disks":[{"path":"@/in/folder/disk"}]}"#,
            r#"{"payload":{},"serial":{"mode":"File","file":"@/in/folder/log"}}"#,
            r#"{"payload":{},"serial":{"mode":"Socket","socket":"@/in/folder/serial"}}"#,
        ];
        for body in refused {
            assert_eq!(place.code(body), "path-not-allowed", "{body}");
        }
        let broken = r#"{"payload":{},"serial":{"mode":"File","file":"@/in/broken"}}"#;
        assert_eq!(place.code(broken), "path-unusable");
        // What is opened is what was checked.
        let back = r#"{"payload":{},"disks":[{"path":"@/out/back"}]}"#;
        let resolved = place.check(&["in"], back).unwrap();
        let disk = place.at("in/disk").canonicalize().unwrap();
        let opens = resolved.disks.unwrap()[0].path.clone().unwrap();
        assert_eq!(Path::new(&opens), disk);
        assert!(!place.at("out/new").exists() && !place.at("in/log").exists());
    }

    #[test]
    fn unusable_paths_are_refused_unopened() {
        let place = Place::new();
        let fifo = place.at("in/fifo");
        let made = std::process::Command::new("mkfifo").arg(fifo).status();
        assert!(made.unwrap().success());
        for body in [
            r#"{"payload":{},"disks":[{"path":"@/in/fifo"}]}"#,
            r#"{"payload":{},"disks":[{"path":"@/in/none"}]}"#,
            r#"{"payload":{},"serial":{"mode":"File","file":"@/in/fifo"}}"#,
            r#"{"payload":{},"serial":{"mode":"File","file":"@/in/deeper"}}"#,
            r#"{"payload":{},"serial":{"mode":"Socket","socket":"@/in/disk"}}"#,
            r#"{"payload":{},"rng":{"src":"@/in/fifo"}}"#,
        ] {
            assert_eq!(place.code(body), "path-unusable", "{body}");
        }
        let body = r#"{"payload":{"kernel":"@/in/none"}}"#;
        assert_eq!(place.code(body), "payload-missing");
    }

    #[test]
    fn taps_are_allowed_by_name() {
        let place = Place::new();
        let check = |taps: &[&str], body: &str| {
            let what = AwaitMigration {
                allow_taps: Some(taps.iter().map(|tap| (*tap).to_owned()).collect()),
                ..AwaitMigration::at("")
            };
            let unix = Endpoint::Unix("/m".into());
            let allowed = MigrationTrust::default().allowed(&unix, &what).unwrap();
            allowed
                .check(&place.config(body), &[])
                .map(|_| ())
                .map_err(|why| why.code)
        };
        let named = r#"{"payload":{},"net":[{"tap":"br0-web"}]}"#;
        let new = r#"{"payload":{},"net":[{}]}"#;
        let refused = || Err("tap-not-allowed".to_owned());
        assert_eq!(check(&["br0-web"], named), Ok(()));
        assert_eq!(check(&["br0-*"], named), Ok(()));
        assert_eq!(check(&["br0", "web*"], named), refused());
        assert_eq!(check(&[], named), refused());
        assert_eq!(check(&["vmtap*"], new), Ok(()));
        assert_eq!(check(&["vmtap"], new), refused());
        assert_eq!(check(&["br0-*"], new), refused());
    }

    #[test]
    fn peer_rights_follow_endpoint() {
        let trust = MigrationTrust {
            allow: vec!["/images".into()],
            ..MigrationTrust::default()
        };
        let (unix, tcp) = (Endpoint::Unix("/m".into()), Endpoint::Tcp("h:1".to_owned()));
        let plain = AwaitMigration::at("");
        assert!(trust.allowed(&unix, &plain).unwrap().paths.is_none());
        let over_tcp = trust.allowed(&tcp, &plain).unwrap();
        assert_eq!(over_tcp.paths, Some(vec!["/images".into()]));
        assert_eq!(over_tcp.taps, Some(Vec::new()));
        let narrow = AwaitMigration {
            allow: Some(vec!["/one".to_owned()]),
            ..AwaitMigration::at("")
        };
        for endpoint in [&unix, &tcp] {
            let allowed = trust.allowed(endpoint, &narrow).unwrap();
            assert_eq!(allowed.paths, Some(vec!["/one".into()]));
        }
        let relative = AwaitMigration {
            allow: Some(vec!["images".to_owned()]),
            ..AwaitMigration::at("")
        };
        assert!(trust.allowed(&unix, &relative).is_err());
        // Plaintext is for those who ask for it, and TLS for those who are named.
        let refused = trust.check_plaintext(&tcp, false, false).unwrap_err();
        assert_eq!(refused.code, "plaintext-refused");
        assert!(trust.check_plaintext(&tcp, false, true).is_ok());
        assert!(trust.check_plaintext(&tcp, true, false).is_ok());
        assert!(trust.check_plaintext(&unix, false, false).is_ok());
        assert!(trust.peers(&plain).is_err());
        let open = MigrationTrust {
            insecure: true,
            tls_peers: vec!["host-a".to_owned()],
            ..trust
        };
        assert!(open.check_plaintext(&tcp, false, false).is_ok());
        assert!(open.peers(&plain).is_ok());
    }
}
