//! Builds the kernel: one call of the compiler that builds the rest, for the same target, with a
//! linker script and without a standard library.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernel");
    println!("cargo::rerun-if-changed=src");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            println!("cargo::error=The pocket guest cannot be built: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let target = variable("TARGET")?;
    if !target.starts_with("x86_64-") {
        return Err(format!(
            "the target is {target}, and the guest supports only x86_64"
        ));
    }
    let kernel = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("kernel");
    let script = kernel.join("link.ld");
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        .args(["--edition=2024", "--crate-type=bin", "--crate-name=pocket"])
        .arg(format!("--target={target}"))
        .args(["-Copt-level=2", "-Ccodegen-units=1", "-Cstrip=debuginfo"])
        .args([
            "-Cpanic=abort",
            "-Crelocation-model=static",
            "-Cforce-unwind-tables=no",
        ])
        // Its own entry point and layout; nothing of a C library.
        .args(
            ["-nostartfiles", "-nostdlib", "-static", "-no-pie"]
                .map(|arg| format!("-Clink-arg={arg}")),
        )
        .arg(format!("-Clink-arg=-T{}", script.display()))
        .args(
            ["--build-id=none", "-z,max-page-size=4096", "-z,noexecstack"]
                .map(|arg| format!("-Clink-arg=-Wl,{arg}")),
        )
        .arg("-o")
        .arg(PathBuf::from(variable("OUT_DIR")?).join("pocket.elf"))
        .arg(kernel.join("main.rs"));
    // Set where the user has configured a linker for this target.
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let output = rustc
        .output()
        .map_err(|error| format!("cannot start the compiler: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        for line in text.lines() {
            println!("cargo::warning={line}");
        }
        Ok(())
    } else {
        Err(text.lines().collect::<Vec<_>>().join("\ncargo::error="))
    }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("Cargo has not set {name}"))
}
