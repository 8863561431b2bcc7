//! The command line of Cloud Hypervisor v54: its version line, and its options one by one.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use anyhow::{Result, bail};
use api::ClaimedVersion;
use clap::{Arg, ArgMatches, Command};

/// The environment variable that sets the claimed version for a program which is started with a fixed
/// command line, by libvirt for instance.
pub(crate) const CLAIM_VARIABLE: &str = "WHIMBREL_CLAIM_VERSION";

/// Returns the claimed version, as far as the command line and the variable have a valid one. `--version`
/// ends the program while clap reads the command line, so that it cannot be asked.
pub(crate) fn claimed(
    mut arguments: impl Iterator<Item = OsString>,
    variable: Option<OsString>,
) -> ClaimedVersion {
    let mut claim = variable;
    while let Some(argument) = arguments.next() {
        match argument.to_str().map(|text| text.split_once('=')) {
            Some(Some(("--claim-version", value))) => claim = Some(value.into()),
            Some(None) if argument == "--claim-version" => claim = arguments.next(),
            _ => {}
        }
    }
    let text = claim.and_then(|claim| claim.into_string().ok());
    // One that is not valid is refused where the program starts.
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The name under which consumers start Cloud Hypervisor.
const NAME: &str = "cloud-hypervisor";

/// Returns the command that a program started as `program` is. Started as `cloud-hypervisor`, by a link,
/// `--version` prints the line that consumers parse, from which they derive what they may send, and then
/// the program's own name and version.
pub(crate) fn command(command: Command, program: Option<&OsStr>, claim: ClaimedVersion) -> Command {
    let command = know_refused(command.mut_subcommand("run", know_refused));
    match program.map(Path::new).and_then(Path::file_name) {
        Some(name) if name == NAME => {
            let own = env!("CARGO_PKG_VERSION");
            // clap keeps the text for the life of the program, which asks once.
            let version: &'static str = format!("v{claim}\nwhimbrel {own}").leak();
            command.name(NAME).version(version)
        }
        _ => command,
    }
}

/// How far an option of Cloud Hypervisor is supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Support {
    /// Has its effect; values that have none yet are refused by name.
    Works,
    /// Refused, with this reason.
    Refused(&'static str),
}

use Support::{Refused, Works};

const NO_PASSTHROUGH: &str = "devices of the host cannot be given to guests yet";
const NOT_BUILT: &str = "Cloud Hypervisor has it in builds with another feature only";

/// Each option of Cloud Hypervisor v54, by its long name.
pub(crate) const OPTIONS: &[(&str, Support)] = &[
    ("api-socket", Works),
    ("balloon", Works),
    ("cmdline", Works),
    ("console", Works),
    ("cpus", Works),
    ("dbus-object-path", Refused(NOT_BUILT)),
    ("dbus-service-name", Refused(NOT_BUILT)),
    ("dbus-system-bus", Refused(NOT_BUILT)),
    ("debug-console", Works),
    ("device", Refused(NO_PASSTHROUGH)),
    ("disk", Works),
    ("event-monitor", Works),
    ("firmware", Works),
    ("fs", Refused("there is no virtio-fs device yet")),
    ("fw-cfg-config", Refused(NOT_BUILT)),
    ("gdb", Refused(NOT_BUILT)),
    (
        "generic-vhost-user",
        Refused("there are no vhost-user devices yet"),
    ),
    ("host-data", Refused(NOT_BUILT)),
    ("igvm", Refused(NOT_BUILT)),
    ("initramfs", Works),
    ("ivshmem", Refused(NOT_BUILT)),
    ("kernel", Works),
    ("landlock", Works),
    ("landlock-rules", Works),
    ("log-file", Works),
    ("log-format", Works),
    ("memory", Works),
    ("memory-zone", Works),
    ("net", Works),
    ("no-shutdown", Works),
    ("numa", Works),
    ("pci-segment", Works),
    ("platform", Works),
    ("pmem", Refused("there is no virtio-pmem device yet")),
    ("pvmemcontrol", Refused(NOT_BUILT)),
    ("pvpanic", Works),
    ("rate-limit-group", Works),
    ("restore", Works),
    ("rng", Works),
    (
        "rtc",
        Refused("there is no virtio clock yet; guests take the time from kvmclock"),
    ),
    ("seccomp", Works),
    ("serial", Works),
    ("tpm", Works),
    ("user-device", Refused("there are no vfio-user devices yet")),
    ("vdpa", Refused("there are no vDPA devices yet")),
    ("vsock", Works),
    ("watchdog", Works),
];

/// Gives a command each refused option that it lacks, hidden and with any number of values.
fn know_refused(command: Command) -> Command {
    let known: Vec<_> = command
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect();
    let refused = OPTIONS.iter().filter(|(name, support)| {
        matches!(support, Refused(_)) && !known.iter().any(|known| known == name)
    });
    command.args(refused.map(|(name, _)| {
        let arg = Arg::new(*name).long(*name).num_args(0..);
        // Behind a subcommand's name everything is that subcommand's.
        arg.hide(true).action(clap::ArgAction::Append)
    }))
}

/// Refuses the options that have no effect, by name and with the reason.
pub(crate) fn check(matches: &ArgMatches) -> Result<()> {
    for (name, support) in OPTIONS {
        let is_given = |matches: &ArgMatches| {
            let ids = matches.ids().any(|id| id.as_str() == *name);
            ids && matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine)
        };
        let run = matches.subcommand_matches("run");
        if let Refused(reason) = support
            && (is_given(matches) || run.is_some_and(is_given))
        {
            bail!("--{name}: {reason}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::args::Arguments;

    const SECTION: &str = "
## Options of the command line

A refused option ends the program with the reason. Of the others, values that have no effect yet are
refused by name.

| option | this version |
|---|---|
";

    fn whimbrel() -> Command {
        command(Arguments::command(), None, ClaimedVersion::default())
    }

    #[test]
    fn version_is_parsed_by_consumers_when_started_by_their_name() {
        let started_as = |program: &str| {
            let program = Some(OsStr::new(program));
            let claim = ClaimedVersion::default();
            command(Arguments::command(), program, claim).render_version()
        };
        let version = started_as("/usr/bin/cloud-hypervisor");
        let mut lines = version.lines();
        assert_eq!(lines.next(), Some("cloud-hypervisor v54.0.0"));
        let own = concat!("whimbrel ", env!("CARGO_PKG_VERSION"));
        assert_eq!((lines.next(), lines.next()), (Some(own), None));
        assert_eq!(started_as("./whimbrel").trim(), own);
    }

    #[test]
    fn an_older_version_is_claimed_by_option_or_variable() {
        let claim = |line: &str, variable: Option<&str>| {
            let line = line.split(' ').map(OsString::from);
            claimed(line, variable.map(OsString::from)).to_string()
        };
        assert_eq!(claim("cloud-hypervisor --version", None), "54.0.0");
        assert_eq!(
            claim("x --claim-version 51.1 --version", Some("40")),
            "51.1.0"
        );
        assert_eq!(claim("x --version --claim-version=v35.1", None), "35.1.0");
        assert_eq!(claim("x --version", Some("46")), "46.0.0");
        assert_eq!(claim("x --claim-version", Some("fifty")), "54.0.0");
        let line = ["whimbrel", "--claim-version", "99", "serve"];
        assert!(whimbrel().try_get_matches_from(line).is_err());
        let program = Some(OsStr::new("/usr/bin/cloud-hypervisor"));
        let version = command(Arguments::command(), program, "51.1".parse().unwrap());
        let version = version.render_version();
        assert!(
            version.starts_with("cloud-hypervisor v51.1.0\n"),
            "{version}"
        );
    }

    #[test]
    fn page_of_compatibility_lists_each_option() {
        const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/compatibility.md");
        let mut section = SECTION.to_owned();
        for (name, support) in OPTIONS {
            let support = match support {
                Works => "supported".to_owned(),
                Refused(reason) => format!("refused: {reason}"),
            };
            section += &format!("| `--{name}` | {support} |\n");
        }
        let there = std::fs::read_to_string(PATH).unwrap();
        let (before, options) = there.split_at(there.find("\n## Options").unwrap_or(there.len()));
        if std::env::var_os("UPDATE_COMPATIBILITY").is_some() {
            std::fs::write(PATH, format!("{before}{section}")).unwrap();
            return;
        }
        assert!(
            options == section,
            "docs/compatibility.md is not what OPTIONS says; renew it by \
             UPDATE_COMPATIBILITY=1 cargo test -p whimbrel compatibility"
        );
    }

    #[test]
    fn each_option_is_parsed_or_refused_by_name() {
        assert!(OPTIONS.is_sorted_by_key(|(name, _)| *name));
        whimbrel().debug_assert();
        for (name, support) in OPTIONS {
            let long = format!("--{name}");
            match support {
                Works => {
                    let mut arguments = Arguments::command();
                    arguments.build();
                    let known = arguments
                        .get_arguments()
                        .any(|arg| arg.get_long() == Some(name));
                    assert!(known, "{long}");
                }
                Refused(reason) => {
                    for line in [
                        vec!["whimbrel", &long, "x"],
                        vec!["whimbrel", "--kernel", "/k", &long],
                        vec!["whimbrel", "run", "--kernel", "/k", &long, "x", "y"],
                    ] {
                        // One that is in `Arguments` may want a value, or none.
                        let Ok(matches) = whimbrel().try_get_matches_from(&line) else {
                            continue;
                        };
                        assert!(Arguments::from_arg_matches(&matches).is_ok());
                        let refused = check(&matches).unwrap_err().to_string();
                        assert_eq!(refused, format!("{long}: {reason}"));
                    }
                }
            }
        }
        for line in [
            vec!["whimbrel", "--device", "path=/x"],
            vec!["whimbrel", "--fs", "tag=x,socket=/x"],
            vec!["whimbrel", "--gdb", "path=/x"],
        ] {
            let matches = whimbrel().try_get_matches_from(&line).unwrap();
            assert!(check(&matches).is_err(), "{line:?}");
        }
        let works = [
            "whimbrel",
            "--kernel",
            "/k",
            "--no-shutdown",
            "--debug-console",
            "off",
        ];
        check(&whimbrel().try_get_matches_from(works).unwrap()).unwrap();
    }
}
