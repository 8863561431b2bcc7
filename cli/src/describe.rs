//! Prints the manifest of a snapshot, of this version of the format or of a later one.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Maximum size of a manifest in bytes, in every version.
const MAX: u64 = 64 << 10;

/// Reads the manifest of the snapshot in a folder of this host.
pub(crate) fn manifest(folder: &str) -> Result<Value> {
    let folder = folder.strip_prefix("file://").unwrap_or(folder);
    let path = Path::new(folder).join("manifest.json");
    let shown = path.display();
    let file = File::open(&path).with_context(|| format!("cannot read {shown}"))?;
    let mut text = Vec::new();
    let read = file.take(MAX + 1).read_to_end(&mut text);
    read.with_context(|| format!("cannot read {shown}"))?;
    ensure!(
        text.len() as u64 <= MAX,
        "{shown} has more than {MAX} bytes"
    );
    let manifest: Value =
        serde_json::from_slice(&text).with_context(|| format!("{shown} is not JSON"))?;
    let is_snapshot = manifest["format"] == "whimbrel-snapshot";
    ensure!(is_snapshot, "{shown} is not the manifest of a snapshot");
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_manifests_of_any_version() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        let path = dir.path().join("manifest.json");
        assert!(manifest(folder).is_err());
        for (text, good) in [
            (
                r#"{"format":"whimbrel-snapshot","version":99,"new":1}"#,
                true,
            ),
            (r#"{"format":"other","version":1}"#, false),
            ("[1]", false),
            ("{", false),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(
                manifest(&format!("file://{folder}")).is_ok(),
                good,
                "{text}"
            );
        }
        std::fs::write(&path, vec![b' '; (MAX + 1) as usize]).unwrap();
        let refused = manifest(folder).unwrap_err().to_string();
        assert!(refused.contains("more than 65536 bytes"), "{refused}");
    }
}
