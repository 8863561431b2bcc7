//! The paths of the host that a configuration names, and what each is used for.

use crate::console::ConsoleMode;
use crate::vm::VmConfig;

/// The use of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathUse {
    /// The file is read.
    Read,
    /// The file is read and written.
    Write,
    /// The file is emptied, or made, and written.
    Create,
    /// A unix socket is made there.
    Listen,
    /// A unix socket of another program is there.
    Connect,
}

/// A path that a configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPath<'a> {
    /// The JSON pointer of the field.
    pub pointer: String,
    /// The path, as it is written there.
    pub path: &'a str,
    /// The use of the path.
    pub used: PathUse,
}

impl VmConfig {
    /// All paths of the host that the configuration names, without those of devices that this version
    /// does not support. A vsock device also connects to `SOCKET_PORT` beside its own socket.
    #[must_use]
    pub fn paths(&self) -> Vec<NamedPath<'_>> {
        let mut all = Vec::new();
        let payload = &self.payload;
        for (field, path) in [
            ("kernel", &payload.kernel),
            ("firmware", &payload.firmware),
            ("initramfs", &payload.initramfs),
        ] {
            all.extend(named(
                format!("/payload/{field}"),
                path.as_ref(),
                PathUse::Read,
            ));
        }
        for (i, disk) in self.disks.iter().flatten().enumerate() {
            let used = if disk.readonly {
                PathUse::Read
            } else {
                PathUse::Write
            };
            all.extend(named(format!("/disks/{i}/path"), disk.path.as_ref(), used));
        }
        for end in self.console_ends() {
            let name = end.name;
            match end.mode {
                ConsoleMode::File => {
                    all.extend(named(format!("/{name}/file"), end.file, PathUse::Create));
                }
                ConsoleMode::Socket => {
                    all.extend(named(
                        format!("/{name}/socket"),
                        end.socket,
                        PathUse::Listen,
                    ));
                }
                _ => {}
            }
        }
        all.extend(named(
            "/rng/src".to_owned(),
            Some(&self.rng.src),
            PathUse::Read,
        ));
        if let Some(vsock) = &self.vsock {
            all.extend(named(
                "/vsock/socket".to_owned(),
                Some(&vsock.socket),
                PathUse::Listen,
            ));
        }
        if let Some(tpm) = &self.tpm {
            all.extend(named(
                "/tpm/socket".to_owned(),
                Some(&tpm.socket),
                PathUse::Connect,
            ));
        }
        all
    }
}

fn named(pointer: String, path: Option<&String>, used: PathUse) -> Option<NamedPath<'_>> {
    Some(NamedPath {
        pointer,
        path: path?,
        used,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_is_named_with_its_use() {
        let config: VmConfig = crate::parse(
            br#"{"payload":{"kernel":"/k","initramfs":"/i"},
                "disks":[{"path":"/a"},{"path":"/b","readonly":true}],
                "serial":{"mode":"File","file":"/s"},"console":{"mode":"Socket","socket":"/c"},
                "debug_console":{"mode":"File","file":"/l"},
                "vsock":{"cid":3,"socket":"/v"},"tpm":{"socket":"/t"}}"#,
        )
        .unwrap();
        let found: Vec<_> = config.paths();
        let found: Vec<_> = found
            .iter()
            .map(|named| (named.pointer.as_str(), named.path, named.used))
            .collect();
        let expected = [
            ("/payload/kernel", "/k", PathUse::Read),
            ("/payload/initramfs", "/i", PathUse::Read),
            ("/disks/0/path", "/a", PathUse::Write),
            ("/disks/1/path", "/b", PathUse::Read),
            ("/serial/file", "/s", PathUse::Create),
            ("/console/socket", "/c", PathUse::Listen),
            ("/debug_console/file", "/l", PathUse::Create),
            ("/rng/src", "/dev/urandom", PathUse::Read),
            ("/vsock/socket", "/v", PathUse::Listen),
            ("/tpm/socket", "/t", PathUse::Connect),
        ];
        assert_eq!(found, expected);
    }

    /// A pseudo terminal's path is shown in `file`, and is not opened from there.
    #[test]
    fn ignores_paths_unused_by_mode() {
        let body = br#"{"payload":{},"serial":{"mode":"Pty","file":"/dev/pts/1"}}"#;
        let config: VmConfig = crate::parse(body).unwrap();
        assert!(
            config
                .paths()
                .iter()
                .all(|named| named.pointer == "/rng/src")
        );
    }
}
