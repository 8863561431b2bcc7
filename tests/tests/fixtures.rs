//! Consumers of Cloud Hypervisor, replayed: each file of `tests/consumers` has the command line with
//! which a consumer starts the VMM, and its requests in their order. `tests/consumers/README.md`
//! describes the files.

mod replay;

use std::path::Path;

use anyhow::{Result, ensure};
use replay::Scene;

/// Replays a file, and declares a test of its name.
macro_rules! consumers {
    ($($name:ident $file:literal;)*) => {
        $(
            #[test]
            fn $name() -> Result<()> {
                Scene::new(include_str!(concat!("../consumers/", $file, ".json")))?.replay()
            }
        )*

        const FILES: &[&str] = &[$(concat!($file, ".json")),*];
    };
}

consumers! {
    flintlock "flintlock";
    hypeman "hypeman";
    kata_runtime_go "kata-runtime-go";
    kata_runtime_rs "kata-runtime-rs";
    kata_template_go "kata-template-go";
    libvirt_9 "libvirt-9";
    libvirt_11 "libvirt-11";
    libvirt_11_save "libvirt-11-save";
    msks "msks";
    ubicloud "ubicloud";
}

#[test]
fn every_file_is_replayed() -> Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("consumers");
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let is_known = FILES.iter().any(|file| name == *file) || name == "README.md";
        ensure!(is_known, "{name:?} has no test");
    }
    Ok(())
}

/// A mark must not hide that a step passes, nor that it is refused for another reason.
#[test]
fn marks_are_checked() -> Result<()> {
    let start = r#""start": [{"arguments": ["--api-socket", "{dir}/api.sock"]}]"#;
    for (step, why) in [
        (
            r#"{"request": "GET vmm.ping", "later": "nothing", "refused": "x"}"#,
            "remove the mark",
        ),
        (
            r#"{"request": "PUT vm.boot", "later": "nothing", "refused": "no such words"}"#,
            "for another reason",
        ),
        (r#"{"request": "PUT vm.boot"}"#, "404"),
        (
            r#"{"request": "GET vmm.ping", "answer": {"/version": "v1"}}"#,
            "/version",
        ),
    ] {
        let text = format!(r#"{{"consumer": "x", "version": "1", {start}, "steps": [{step}]}}"#);
        let error = Scene::new(&text)?.replay().err();
        let error = error.map_or_else(String::new, |error| format!("{error:#}"));
        ensure!(error.contains(why), "{step}: {error}");
    }
    Ok(())
}

/// The same for an option of the command line.
#[test]
fn marked_options_are_checked() -> Result<()> {
    let kernel = r#"{"arguments": ["--api-socket", "{dir}/api.sock", "--kernel", "{kernel}"]}"#;
    for (arguments, refused, why) in [
        (r#""--cpus", "boot=1""#, "--cpus", "remove the mark"),
        (
            r#""--fs", "tag=x,socket=/s""#,
            "no such words",
            "for another reason",
        ),
    ] {
        let marked = format!(
            r#"{{"arguments": [{arguments}], "later": "nothing", "refused": "{refused}"}}"#
        );
        let text = format!(
            r#"{{"consumer": "x", "version": "1", "start": [{kernel}, {marked}], "steps": []}}"#
        );
        let error = Scene::new(&text)?.replay().err();
        let error = error.map_or_else(String::new, |error| format!("{error:#}"));
        ensure!(error.contains(why), "{arguments}: {error}");
    }
    Ok(())
}
