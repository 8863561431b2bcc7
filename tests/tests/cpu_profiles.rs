//! CPU profiles: what a guest sees, which hosts can run it, and its move between two services.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Output};
use std::time::Duration;

use guest::Options;
use openapi::ClientError;
use spec::{CpuProfile, MigrationPhase, StartMigration, VmId};
use tests::{Face, Service, await_anyone, built};

const PATIENCE: Duration = Duration::from_secs(60);

fn remote(at: &Service, arguments: &[&str]) -> Output {
    let mut command = Command::new(built("wh-remote").unwrap());
    command.arg("--api-socket").arg(at.socket());
    command.args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn boot(at: &Service, name: &str, profile: CpuProfile) -> Result<VmId, ClientError> {
    let options = Options {
        heartbeat_ms: Some(100),
        ..Options::default()
    };
    let (mut config, _) = at.pocket(name, options).unwrap();
    config.cpus.profile = profile;
    let id = at.create(name, config).await.unwrap();
    at.client().vms_boot(&id).await.map(|()| id)
}

/// The best profile that both services can run: a guest that has it moves, and sees the same at the other.
#[tokio::test]
async fn guest_with_baseline_of_two_hosts_moves_between_them() {
    let (a, b) = tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    let (a, b) = (a.unwrap(), b.unwrap());
    let (here, there) = (a.socket(), b.socket());
    let sockets = [here.to_str().unwrap(), there.to_str().unwrap()];
    let printed = remote(&a, &["cpu", "baseline", sockets[0], sockets[1]]);
    assert!(printed.status.success(), "{}", stderr(&printed));
    let profile = serde_json::Value::from(stdout(&printed).trim());
    let profile: CpuProfile = serde_json::from_value(profile).unwrap();
    assert_ne!(profile, CpuProfile::Host);

    let vm = boot(&a, "guest", profile).await.unwrap();
    let seen = a.client().vms_cpu(&vm).await.unwrap();
    assert_eq!(seen.profile, profile);
    let host = a.client().host_cpu().await.unwrap();
    let hidden = |feature: &&String| !seen.features.contains(feature);
    let hidden: Vec<_> = host.cpu.features.iter().filter(hidden).collect();
    assert!(
        !hidden.is_empty(),
        "the profile hides nothing of this host: {seen:?}"
    );
    println!("{profile} hides {hidden:?}");
    let check = remote(&a, &["--vm", "guest", "cpu", "check", sockets[1]]);
    assert!(check.status.success(), "{}", stderr(&check));
    assert!(
        stdout(&check).starts_with("the guest can run on"),
        "{}",
        stdout(&check)
    );

    let waiting = b
        .client()
        .migrations_receive(&await_anyone("tcp:127.0.0.1:0"))
        .await
        .unwrap();
    let what = StartMigration {
        insecure: true,
        ..StartMigration::to(waiting.endpoint.clone())
    };
    a.client().vms_migrate(&vm, &what).await.unwrap();
    let id = waiting.id.parse().unwrap();
    let ended = b
        .until(&id, PATIENCE, |info| info.phase.is_over())
        .await
        .unwrap();
    assert_eq!(ended.phase, MigrationPhase::Completed, "{ended:?}");
    assert_eq!(b.client().vms_cpu(&vm).await.unwrap(), seen);
}

/// A guest that has seen more than this host has is refused by the names of what lacks.
#[tokio::test]
async fn lacking_features_are_named() {
    let service = Service::start(Face::Many).await.unwrap();
    let host = service.client().host_cpu().await.unwrap();
    let mut fits = host.profiles.iter().filter(|fit| !fit.lacking.is_empty());
    let lacking = fits
        .next()
        .expect("no host runs the profiles of both makers");
    let refused = boot(&service, "guest", lacking.profile).await.unwrap_err();
    let text = refused.to_string();
    assert!(text.contains(&lacking.lacking[0]), "{text}");
    assert!(text.contains(&lacking.profile.to_string()), "{text}");

    let vm = boot(&service, "other", CpuProfile::Host).await.unwrap();
    let mut guest = service.client().vms_cpu(&vm).await.unwrap();
    let check = service.client().check_cpu(&guest).await.unwrap();
    assert_eq!(check.lacking, [""; 0]);
    // Bit 31 of leaf 7's EBX: a guest that has seen AVX-512 VL. Bit 0 of an undefined leaf.
    for leaf in &mut guest.cpuid {
        if (leaf.function, leaf.index) == (7, 0) {
            leaf.ebx |= 1 << 31;
        }
    }
    let undefined = spec::CpuidLeaf {
        function: 0x2a,
        index: 3,
        eax: 0,
        ebx: 1,
        ecx: 0,
        edx: 0,
    };
    guest.cpuid.push(undefined);
    let check = service.client().check_cpu(&guest).await.unwrap();
    assert_eq!(
        check.lacking,
        ["avx512vl (CPUID.7H:0.EBX[31])", "CPUID.2AH:3.EBX[0]"]
    );
    guest.cpuid = vec![undefined; 257];
    let refused = service.client().check_cpu(&guest).await.unwrap_err();
    assert!(refused.to_string().contains("257 leaves"), "{refused}");
}

#[tokio::test]
async fn bad_hosts_and_vms_are_named() {
    let service = Service::start(Face::Many).await.unwrap();
    let socket = service.socket();
    for (arguments, wanted) in [
        (vec!["cpu", "baseline"], "<HOST>"),
        (
            vec!["cpu", "baseline", "example"],
            "neither the path of a socket nor ADDRESS:PORT",
        ),
        (
            vec!["cpu", "baseline", "/nowhere/a.sock"],
            "/nowhere/a.sock",
        ),
        (vec!["cpu", "check", socket.to_str().unwrap()], "--vm"),
        (
            vec!["--vm", "none", "cpu", "check", socket.to_str().unwrap()],
            "none",
        ),
    ] {
        let output = remote(&service, &arguments);
        assert!(!output.status.success(), "{arguments:?}");
        let said = stderr(&output);
        assert!(said.contains(wanted), "{arguments:?}: {said}");
    }
    let unknown = r#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"profile":"x86-64-v9"},"payload":{"kernel":"/k"}}"#;
    let error = spec::parse::<spec::VmConfig>(unknown.as_bytes()).unwrap_err();
    assert!(error.to_string().contains("x86-64-v2"), "{error}");
}
