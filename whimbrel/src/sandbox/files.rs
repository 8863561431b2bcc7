//! Landlock: the files that the program can open.
//!
//! The rules are fixed when the program starts, for all of its threads, and nothing widens them
//! later. With a VM on the command line they follow from its configuration. What clients add later
//! (VMs of a service, devices to hot-add) must be below what `--landlock-rules` names.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};
use spec::{LandlockConfig, PathUse, VmConfig};

/// The rights that are denied unless a rule grants them: all of Linux 6.10, of which the kernel
/// takes those that it knows.
const DENIED: ABI = ABI::V5;

/// Paths that every VM needs, as far as the host has them.
const ALWAYS: [(&str, Access); 12] = [
    ("/dev/kvm", Access::Write),
    ("/dev/net/tun", Access::Write),
    ("/dev/userfaultfd", Access::Write),
    ("/dev/null", Access::Write),
    ("/dev/urandom", Access::Read),
    // Pseudo terminals of consoles, and the terminal of the user.
    ("/dev/ptmx", Access::Write),
    ("/dev/pts", Access::Write),
    ("/dev/tty", Access::Write),
    // The names of migration peers: the C library's configuration and modules.
    ("/etc", Access::Read),
    ("/usr/lib", Access::Read),
    // Backtraces of panics, and the number of CPUs.
    ("/proc/self", Access::Read),
    // Whether a migration's journal or image is of the current boot of the host.
    ("/proc/sys/kernel/random/boot_id", Access::Read),
];

/// The rights that a rule grants, for a file or for all that is below a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    /// Reading too, but no making of files.
    Write,
    /// All of `Write`, and making and removing files, sockets and folders.
    Folder,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::IoctlDev;
        let write = read | AccessFs::WriteFile | AccessFs::Truncate;
        match self {
            Self::Read => read,
            Self::Write => write,
            Self::Folder => {
                let make = AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::MakeDir;
                write | make | AccessFs::RemoveFile
            }
        }
    }
}

/// A path that stays open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    path: PathBuf,
    access: Access,
}

impl Rule {
    /// Lets files and sockets come and go in a folder.
    pub(crate) fn folder(path: &Path) -> Self {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        Self {
            path: path.to_owned(),
            access: Access::Folder,
        }
    }

    /// Lets files below a folder be read.
    pub(crate) fn reading(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            access: Access::Read,
        }
    }

    /// Lets a file or socket be made at this path.
    pub(crate) fn maker_of(path: &Path) -> Self {
        Self::folder(path.parent().unwrap_or(path))
    }
}

/// `r`, or `w` and `rw`: reading too, and making files in a folder.
impl FromStr for Access {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "r" => Ok(Self::Read),
            "w" | "rw" => Ok(Self::Folder),
            _ => bail!("the access `{text}` is none of r, w and rw"),
        }
    }
}

impl TryFrom<&LandlockConfig> for Rule {
    type Error = anyhow::Error;

    fn try_from(rule: &LandlockConfig) -> Result<Self> {
        let named = || format!("landlock_rules: the rule of {:?}", rule.path);
        Ok(Self {
            path: PathBuf::from(&rule.path),
            access: rule.access.parse().with_context(named)?,
        })
    }
}

/// Cloud Hypervisor's form: `path=/images,access=rw`.
impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (mut path, mut access) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("path", value)) if !value.is_empty() => path = Some(PathBuf::from(value)),
                Some(("access", value)) => access = Some(value.parse()?),
                _ => bail!("`{part}` is none of path=PATH, access=r, access=w and access=rw"),
            }
        }
        let (Some(path), Some(access)) = (path, access) else {
            bail!("`{text}` lacks path=PATH or access=r, access=w or access=rw");
        };
        Ok(Self { path, access })
    }
}

/// The rules that a VM's configuration needs.
pub(crate) fn of_vm(config: &VmConfig) -> Vec<Rule> {
    let rule = |path: &str, used: PathUse| {
        let path = Path::new(path);
        match used {
            // A rule needs a path that exists. The boot will refuse the missing file by its own,
            // better error.
            PathUse::Read | PathUse::Write if !path.exists() => None,
            // Landlock does not restrict connecting to a socket.
            PathUse::Connect => None,
            PathUse::Read => Some((path.to_owned(), Access::Read)),
            PathUse::Write => Some((path.to_owned(), Access::Write)),
            // A file that is there is emptied, and only that file need be open.
            PathUse::Create if path.exists() => Some((path.to_owned(), Access::Write)),
            PathUse::Create | PathUse::Listen => {
                let Rule { path, access } = Rule::maker_of(path);
                Some((path, access))
            }
        }
    };
    let rules = config.paths().into_iter();
    let rules = rules.filter_map(|named| rule(named.path, named.used));
    let rules = rules.map(|(path, access)| Rule { path, access });
    // Where an image may name other files, they are beside it.
    let disks = config.disks.iter().flatten();
    let named = disks.filter(|disk| disk.backing_files || disk.data_files);
    let beside = named.filter_map(|disk| Path::new(disk.path.as_deref()?).parent());
    rules.chain(beside.map(Rule::reading)).collect()
}

/// How much of the denial the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    NotAsked,
    Partial,
    Full,
}

impl Extent {
    /// Logs what the kernel does not enforce.
    pub(crate) fn log(self) {
        if self == Self::Partial {
            tracing::warn!(
                "the kernel enforces a part of --landlock: before Linux 6.10 it does not restrict \
                 truncation, or ioctl on devices"
            );
        }
    }
}

/// Restricts this thread, and those that it starts from now on, to these rules and [`ALWAYS`].
///
/// # Errors
/// When a rule's path cannot be opened, or the kernel has no Landlock.
pub(super) fn restrict(rules: &[Rule]) -> Result<Extent> {
    let mut ruleset = Ruleset::default()
        // Older kernels enforce what they know. The caller reports a partial denial, and refuses a
        // kernel with none.
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(DENIED))?
        .create()
        .context("the kernel makes no Landlock ruleset")?;
    let always = ALWAYS.iter().filter(|(path, _)| Path::new(path).exists());
    let always = always.map(|(path, access)| (Path::new(*path), *access));
    let given = rules.iter().map(|rule| (rule.path.as_path(), rule.access));
    for (path, access) in always.chain(given) {
        let named = || format!("--landlock: the path {}", path.display());
        let is_folder = path.metadata().with_context(named)?.is_dir();
        let rights = if is_folder {
            access.rights()
        } else {
            // The kernel refuses rights on a file that only a folder can have.
            access.rights() & AccessFs::from_file(DENIED)
        };
        // A rule is bound to the inode that is there now: a file that replaces it later is denied.
        let opened = PathFd::new(path).with_context(named)?;
        ruleset = ruleset
            .add_rule(PathBeneath::new(opened, rights))
            .with_context(named)?;
    }
    let status = ruleset.restrict_self().context("Landlock")?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(Extent::Full),
        RulesetStatus::PartiallyEnforced => Ok(Extent::Partial),
        RulesetStatus::NotEnforced => bail!(
            "--landlock: this kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in the \
             boot parameter lsm=)"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn denied<T>(result: std::io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    }

    #[test]
    fn rules_are_written_as_in_cloud_hypervisor() {
        let rule = |text: &str| text.parse::<Rule>().ok();
        let expected = |access| {
            Some(Rule {
                path: "/images".into(),
                access,
            })
        };
        assert_eq!(rule("path=/images,access=rw"), expected(Access::Folder));
        assert_eq!(rule("access=r,path=/images"), expected(Access::Read));
        for wrong in [
            "/images",
            "path=/images",
            "path=,access=r",
            "path=/images,access=x",
        ] {
            assert_eq!(rule(wrong), None, "{wrong}");
        }
    }

    /// Restricts a thread of the test to what a VM needs, and tries what it can reach.
    #[test]
    fn files_that_no_rule_names_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["kernel", "disk", "secret"] {
            fs::write(at(name), name).unwrap();
        }
        fs::create_dir(at("sockets")).unwrap();
        let body = r#"{"payload":{"kernel":"@/kernel"},"disks":[{"path":"@/disk"}],
            "console":{"mode":"Socket","socket":"@/sockets/console"}}"#;
        let body = body.replace('@', &dir.path().to_string_lossy());
        let config: VmConfig = spec::parse(body.as_bytes()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                if let Err(error) = restrict(&of_vm(&config)) {
                    // Nothing can be shown on a kernel without Landlock, but that it is said.
                    assert!(error.to_string().contains("no Landlock"), "{error:#}");
                    return;
                }
                assert!(File::open(at("kernel")).is_ok());
                assert!(denied(File::options().write(true).open(at("kernel"))));
                assert!(File::options().write(true).open(at("disk")).is_ok());
                assert!(denied(fs::remove_file(at("disk"))));
                assert!(denied(File::open(at("secret"))));
                assert!(denied(File::create(at("new"))));
                assert!(UnixListener::bind(at("sockets/console")).is_ok());
                assert!(File::open("/dev/null").is_ok());
                assert!(
                    denied(File::open("/root/.bashrc")) || !Path::new("/root/.bashrc").exists()
                );
                assert!(
                    thread::scope(|s| s.spawn(|| denied(File::open(at("secret")))).join()).unwrap()
                );
            });
        });
        assert!(
            File::open(at("secret")).is_ok(),
            "other threads are not restricted"
        );
    }

    #[test]
    fn a_vm_is_given_what_its_configuration_names() {
        let body = br#"{"payload":{"kernel":"/dev/null"},
            "serial":{"mode":"File","file":"/nonexistent/serial"},
            "disks":[{"path":"/dev/zero","image_type":"Qcow2","backing_files":true}]}"#;
        let rules = of_vm(&spec::parse::<VmConfig>(body).unwrap());
        let rule = |path: &str, access| Rule {
            path: path.into(),
            access,
        };
        let expected = [
            rule("/dev/null", Access::Read),
            rule("/dev/zero", Access::Write),
            rule("/nonexistent", Access::Folder),
            rule("/dev/urandom", Access::Read),
            rule("/dev", Access::Read),
        ];
        assert_eq!(rules, expected);
    }
}
