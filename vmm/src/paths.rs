//! Paths that a configuration names twice.
//!
//! What a VM writes must be nothing else that it uses: a serial file that is also the kernel would
//! empty that kernel. Other VMs and programs are kept off by locks, which the files' users take.

use std::collections::HashMap;

use devices::host_file::Identity;
use spec::{NamedPath, PathUse, VmConfig};

/// Two fields of a configuration name the same file, and at least one of them changes it.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{first}` and `{second}` both name {path}: a path that a VM writes to can be used only once"
)]
pub struct PathError {
    first: String,
    second: String,
    path: String,
}

/// Checks that no file that the VM writes is named twice. Reads the host's file systems, so that a
/// thread that other VMs need must not call this.
pub(crate) fn check(config: &VmConfig) -> Result<(), PathError> {
    let mut seen: HashMap<Identity, NamedPath<'_>> = HashMap::new();
    for named in config.paths() {
        // Any number of users may share a device such as /dev/null.
        let Some(identity) = Identity::of(named.path.as_ref()) else {
            continue;
        };
        match seen.get(&identity) {
            Some(other) if other.used != PathUse::Read || named.used != PathUse::Read => {
                return Err(PathError {
                    first: field(&other.pointer),
                    second: field(&named.pointer),
                    path: named.path.to_owned(),
                });
            }
            Some(_) => {}
            None => drop(seen.insert(identity, named)),
        }
    }
    Ok(())
}

/// `serial.file`, of `/serial/file`.
fn field(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn refusal(dir: &tempfile::TempDir, body: &str) -> Option<String> {
        let body = body.replace('@', dir.path().to_str().unwrap());
        let config: VmConfig = spec::parse(body.as_bytes()).unwrap();
        check(&config).err().map(|error| error.to_string())
    }

    #[test]
    fn rejects_written_file_named_twice() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "disk"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        symlink(dir.path().join("disk"), dir.path().join("link")).unwrap();
        let fine = [
            r#"{"payload":{"kernel":"@/kernel","initramfs":"@/kernel"}}"#,
            r#"{"payload":{},"disks":[{"path":"@/disk","readonly":true},{"path":"@/link","readonly":true}]}"#,
            r#"{"payload":{},"serial":{"mode":"File","file":"/dev/null"},
                "console":{"mode":"File","file":"/dev/null"}}"#,
            r#"{"payload":{},"serial":{"mode":"Null","file":"@/disk"},"disks":[{"path":"@/disk"}]}"#,
        ];
        for body in fine {
            assert_eq!(refusal(&dir, body), None, "{body}");
        }
        let refused = [
            (
                r#"{"payload":{"kernel":"@/kernel"},"serial":{"mode":"File","file":"@/kernel"}}"#,
                "`payload.kernel` and `serial.file` both name",
            ),
            (
                r#"{"payload":{},"disks":[{"path":"@/disk"},{"path":"@/link"}]}"#,
                "`disks.0.path` and `disks.1.path` both name",
            ),
            (
                r#"{"payload":{},"serial":{"mode":"File","file":"@/new"},
                    "console":{"mode":"File","file":"@/./new"}}"#,
                "`serial.file` and `console.file` both name",
            ),
            (
                r#"{"payload":{},"serial":{"mode":"Socket","socket":"@/s"},
                    "vsock":{"cid":3,"socket":"@/s"}}"#,
                "`serial.socket` and `vsock.socket` both name",
            ),
            (
                r#"{"payload":{},"rng":{"src":"@/disk"},"disks":[{"path":"@/disk"}]}"#,
                "`disks.0.path` and `rng.src` both name",
            ),
        ];
        for (body, expected) in refused {
            let told = refusal(&dir, body).unwrap_or_default();
            assert!(told.starts_with(expected), "{body}: {told}");
        }
    }
}
