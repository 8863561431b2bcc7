//! CPUs of several hosts: what a guest could see on all of them, and whether it can move.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Subcommand};
use openapi::Client;
use serde::Serialize;
use spec::{CpuCheck, CpuDescription, CpuProfile, HostCpu};

use crate::print::Printer;

#[derive(Debug, Subcommand)]
pub(crate) enum CpuCommand {
    /// Show the CPU of the service's host, and the profiles that it can run.
    Host,
    /// Print the best CPU profile that all these hosts can run, for `profile` in `--cpus`.
    ///
    /// The service's own host counts only if it is named.
    #[command(after_help = "\
Examples:
  wh-remote cpu baseline /run/a.sock /run/b.sock
  wh-remote --token-file token cpu baseline /run/whimbrel.sock 127.0.0.1:8081")]
    Baseline {
        /// Each host's service: the path of its socket, or ADDRESS:PORT.
        #[arg(value_name = "HOST", required = true)]
        hosts: Vec<Place>,
    },
    /// Say whether the VM's guest could run on another host, and if not, what that lacks.
    ///
    /// The VM must run or be paused. A migration checks the same before it begins.
    Check(CheckArguments),
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The other host's service: the path of its socket, or ADDRESS:PORT.
    #[arg(value_name = "HOST")]
    pub(crate) host: Place,
}

/// Address of a service.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Socket(std::path::PathBuf),
    Tcp(SocketAddr),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.contains('/') {
            return Ok(Self::Socket(path.into()));
        }
        let address = text.strip_prefix("tcp:").unwrap_or(text);
        let parsed = address.parse().map(Self::Tcp);
        parsed.map_err(|_| format!("`{text}` is neither the path of a socket nor ADDRESS:PORT"))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// The answer of `cpu baseline`.
#[derive(Debug, Serialize)]
struct Baseline {
    profile: CpuProfile,
    hosts: Vec<HostFit>,
}

#[derive(Debug, Serialize)]
struct HostFit {
    host: String,
    /// The best that this host can run alone.
    best: Option<CpuProfile>,
}

/// The profile with most features that all hosts can run.
fn best(hosts: &[&HostCpu]) -> Option<CpuProfile> {
    let runs = |host: &HostCpu, profile: CpuProfile| {
        let mut fits = host.profiles.iter().filter(|fit| fit.lacking.is_empty());
        fits.find(|fit| fit.profile == profile)
            .map(|fit| fit.features)
    };
    let all = CpuProfile::ALL.into_iter().filter_map(|profile| {
        let counts: Option<Vec<u32>> = hosts.iter().map(|host| runs(host, profile)).collect();
        Some((counts?.into_iter().min()?, profile))
    });
    // Of two with as many features the later one: a model says more than a level.
    all.max_by_key(|(features, _)| *features)
        .map(|(_, profile)| profile)
}

pub(crate) async fn baseline(
    hosts: &[Place],
    client: impl Fn(&Place) -> Result<Client>,
    printer: Printer,
) -> Result<()> {
    let mut found = Vec::new();
    for host in hosts {
        let cpu = client(host)?.host_cpu().await;
        found.push((host, cpu.with_context(|| format!("cannot ask {host}"))?));
    }
    let cpus: Vec<_> = found.iter().map(|(_, cpu)| cpu).collect();
    let Some(profile) = best(&cpus) else {
        let mut why = String::from("no profile runs on all these hosts");
        for (host, cpu) in &found {
            let least = cpu.profiles.first().map(|fit| fit.lacking.join(", "));
            let _ = write!(
                why,
                "; {host} lacks for x86-64-v1: {}",
                least.unwrap_or_default()
            );
        }
        bail!(why);
    };
    let fit = |(host, cpu): &(&Place, HostCpu)| HostFit {
        host: host.to_string(),
        best: best(&[cpu]),
    };
    let baseline = Baseline {
        profile,
        hosts: found.iter().map(fit).collect(),
    };
    // The profile alone, so that a script can use it.
    printer.show(&baseline, |baseline| baseline.profile.to_string())
}

pub(crate) async fn check(
    guest: &CpuDescription,
    host: &Place,
    client: &Client,
    printer: Printer,
) -> Result<()> {
    let check = client.check_cpu(guest).await;
    let check = check.with_context(|| format!("cannot ask {host}"))?;
    printer.show(&check, |check: &CpuCheck| match check.lacking.as_slice() {
        [] => format!("the guest can run on {host}"),
        lacking => format!(
            "{host} lacks what the guest has seen:\n  {}",
            lacking.join("\n  ")
        ),
    })?;
    ensure!(check.lacking.is_empty(), "the guest cannot move to {host}");
    Ok(())
}

pub(crate) fn host(host: &HostCpu) -> String {
    let mut text = format!(
        "{}\nfeatures: {}\n",
        host.cpu.vendor,
        host.cpu.features.join(" ")
    );
    for fit in &host.profiles {
        let _ = match fit.lacking.as_slice() {
            [] => writeln!(text, "{}: yes", fit.profile),
            lacking => writeln!(text, "{}: lacks {}", fit.profile, lacking.join(" ")),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(runs: &[CpuProfile]) -> HostCpu {
        let fit = |profile: &CpuProfile, features: usize| spec::ProfileFit {
            profile: *profile,
            features: u32::try_from(features).unwrap(),
            lacking: match runs.contains(profile) {
                true => Vec::new(),
                false => vec!["avx".to_owned()],
            },
        };
        let all = CpuProfile::ALL.iter().enumerate();
        HostCpu {
            profiles: all.map(|(at, profile)| fit(profile, at)).collect(),
            ..HostCpu::default()
        }
    }

    #[test]
    fn best_profile_runs_on_each_host() {
        use CpuProfile::{EpycMilan, EpycRome, V1, V2, V3};
        let new = cpu(&[V1, V2, V3, EpycRome, EpycMilan]);
        let old = cpu(&[V1, V2, V3, EpycRome]);
        let other = cpu(&[V1, V2]);
        assert_eq!(best(&[&new]), Some(EpycMilan));
        assert_eq!(best(&[&new, &old]), Some(EpycRome));
        assert_eq!(best(&[&new, &old, &other]), Some(V2));
        assert_eq!(best(&[&new, &cpu(&[])]), None);
        // A service of a version without some profile does not run it.
        let mut silent = new.clone();
        silent.profiles.truncate(1);
        assert_eq!(best(&[&new, &silent]), Some(V1));
    }

    #[test]
    fn places_are_sockets_or_addresses() {
        for (text, shown) in [
            ("/run/a.sock", "/run/a.sock"),
            ("unix:./a", "./a"),
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("tcp:[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(text.parse::<Place>().unwrap().to_string(), shown);
        }
        for bad in ["", "host", "127.0.0.1"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }
}
