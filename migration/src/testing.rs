//! Certificates for tests and benchmarks, in directories as Cloud Hypervisor's users have them.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::new_without_default,
    reason = "tests"
)]

use std::fs;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// Who vouches for hosts.
pub struct Issuer(CertifiedIssuer<'static, KeyPair>);

impl Issuer {
    /// Another one.
    #[must_use]
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes what a host needs of this name that trusts this issuer: its certificates for both sides are
    /// signed by `signer`.
    pub fn equip(&self, dir: &Path, host: &str, signer: &Self) {
        let write = |name: &str, text: String| fs::write(dir.join(name), text).unwrap();
        write("ca-cert.pem", self.0.pem());
        for side in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &signer.0).unwrap();
            write(&format!("{side}-cert.pem"), certificate.pem());
            write(&format!("{side}-key.pem"), key.serialize_pem());
        }
    }
}
