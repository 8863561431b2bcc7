//! Connections that nobody on the way can read or change, between two sides that know each other:
//! TLS 1.3, with certificates at both ends.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

use crate::link::{Accept, Closer, Dial, Endpoint, Listener, Stream};

/// A directory of certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be used: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// They do not belong together.
    #[error("the certificates cannot be used: {0}")]
    Config(String),
    /// Only TCP is encrypted: what goes over a unix socket stays on the host.
    #[error("{0} is not `tcp:HOST:PORT`, which alone is encrypted with TLS")]
    Endpoint(Endpoint),
}

fn read(dir: &Path, name: &str) -> Result<(PathBuf, Vec<u8>), TlsError> {
    let path = dir.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(error) => Err(TlsError::File {
            path,
            why: error.to_string(),
        }),
    }
}

fn certificates(dir: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (path, bytes) = read(dir, name)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(TlsError::File {
            path,
            why: "there is no certificate in it".to_owned(),
        }),
        Err(error) => Err(TlsError::File {
            path,
            why: error.to_string(),
        }),
    }
}

fn key(dir: &Path, name: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (path, bytes) = read(dir, name)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| TlsError::File {
        path,
        why: error.to_string(),
    })
}

fn roots(dir: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(dir, "ca-cert.pem")? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Config(error.to_string()))?;
    }
    Ok(roots)
}

fn config(error: &impl ToString) -> TlsError {
    TlsError::Config(error.to_string())
}

/// A TLS connection over another one.
struct TlsStream<C>(StreamOwned<C, Box<dyn Stream>>);

impl Read for TlsStream<ClientConnection> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0.read(data)
    }
}

impl Write for TlsStream<ClientConnection> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Read for TlsStream<ServerConnection> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0.read(data)
    }
}

impl Write for TlsStream<ServerConnection> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<C: Send> Stream for TlsStream<C>
where
    Self: Read + Write,
{
    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.0.sock.set_patience(patience)
    }

    fn closer(&self) -> io::Result<Closer> {
        self.0.sock.closer()
    }

    fn read_closer(&self) -> io::Result<Closer> {
        self.0.sock.read_closer()
    }
}

/// Connects, and makes sure of who is there: `ca-cert.pem` signed its certificate, which names the
/// host. Shows `client-cert.pem`, whose key is in `client-key.pem`.
pub struct TlsDial {
    endpoint: Endpoint,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
}

impl TlsDial {
    /// With the files of a directory.
    ///
    /// # Errors
    /// When one is missing or they do not belong together, or the endpoint is no TCP port.
    pub fn new(endpoint: Endpoint, dir: &Path) -> Result<Self, TlsError> {
        let Endpoint::Tcp(place) = &endpoint else {
            return Err(TlsError::Endpoint(endpoint));
        };
        let host = place
            .rsplit_once(':')
            .map_or(place.as_str(), |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|error| config(&error))?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let built = builder
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| config(&error))?
            .with_root_certificates(roots(dir)?)
            .with_client_auth_cert(
                certificates(dir, "client-cert.pem")?,
                key(dir, "client-key.pem")?,
            )
            .map_err(|error| config(&error))?;
        Ok(Self {
            endpoint,
            name,
            config: Arc::new(built),
        })
    }
}

impl Dial for TlsDial {
    fn dial(&self) -> io::Result<Box<dyn Stream>> {
        let stream = self.endpoint.dial()?;
        let connection = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(io::Error::other)?;
        Ok(Box::new(TlsStream(StreamOwned::new(connection, stream))))
    }
}

/// Takes connections of those whose certificate `ca-cert.pem` signed. Shows `server-cert.pem`, whose
/// key is in `server-key.pem`.
pub struct TlsListener {
    listener: Listener,
    config: Arc<ServerConfig>,
}

impl TlsListener {
    /// With the files of a directory.
    ///
    /// # Errors
    /// When one is missing or they do not belong together, or the endpoint is no TCP port.
    pub fn new(listener: Listener, dir: &Path) -> Result<Self, TlsError> {
        if let Listener::Unix(_, path) = &listener {
            return Err(TlsError::Endpoint(Endpoint::Unix(path.clone())));
        }
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(dir)?), provider.clone())
                .build()
                .map_err(|error| config(&error))?;
        let built = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| config(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                certificates(dir, "server-cert.pem")?,
                key(dir, "server-key.pem")?,
            )
            .map_err(|error| config(&error))?;
        Ok(Self {
            listener,
            config: Arc::new(built),
        })
    }
}

impl Accept for TlsListener {
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        let Some(stream) = self.listener.accept(patience)? else {
            return Ok(None);
        };
        let connection =
            ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        // Who it is becomes known with the first bytes, which are read elsewhere.
        Ok(Some(Box::new(TlsStream(StreamOwned::new(
            connection, stream,
        )))))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::testing::Issuer;

    fn directory(trusted: &Issuer, signed_by: &Issuer, host: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        trusted.equip(dir.path(), host, signed_by);
        dir
    }

    /// What came over, if anything did.
    fn send(client: &Path, server: &Path) -> (io::Result<()>, io::Result<[u8; 5]>) {
        let listener = Listener::bind(&Endpoint::Tcp("127.0.0.1:0".to_owned())).unwrap();
        let endpoint = listener.endpoint().unwrap();
        let mut listener = TlsListener::new(listener, server).unwrap();
        let far = thread::spawn(move || {
            let mut stream = listener.accept(Duration::from_secs(5)).unwrap().unwrap();
            stream.set_patience(Duration::from_secs(5)).unwrap();
            let mut said = [0; 5];
            stream.read_exact(&mut said)?;
            stream.write_all(b"heard")?;
            Ok(said)
        });
        let said = || -> io::Result<()> {
            let mut stream = TlsDial::new(endpoint, client).unwrap().dial()?;
            stream.set_patience(Duration::from_secs(5))?;
            stream.write_all(b"hello")?;
            stream.read_exact(&mut [0; 5])
        };
        (said(), far.join().unwrap())
    }

    #[test]
    fn those_who_know_each_other_talk_and_nobody_else() {
        let (ours, theirs) = (Issuer::new(), Issuer::new());
        let good = directory(&ours, &ours, "127.0.0.1");
        let (said, heard) = send(good.path(), good.path());
        said.unwrap();
        assert_eq!(&heard.unwrap(), b"hello");
        // Another issuer's certificate, at either side.
        let stranger = directory(&ours, &theirs, "127.0.0.1");
        let (said, heard) = send(good.path(), stranger.path());
        assert!(said.unwrap_err().to_string().contains("certificate"));
        assert!(heard.is_err());
        let (said, heard) = send(stranger.path(), good.path());
        assert!(said.is_err());
        assert!(heard.unwrap_err().to_string().contains("certificate"));
        // Another host's.
        let elsewhere = directory(&ours, &ours, "host.example");
        let (said, _) = send(good.path(), elsewhere.path());
        assert!(said.unwrap_err().to_string().contains("certificate"));
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let ours = Issuer::new();
        let dir = directory(&ours, &ours, "127.0.0.1");
        let endpoint = || Endpoint::Tcp("127.0.0.1:1".to_owned());
        fs::write(dir.path().join("client-key.pem"), "no key").unwrap();
        let refused = TlsDial::new(endpoint(), dir.path()).err().unwrap();
        assert!(refused.to_string().contains("client-key.pem"), "{refused}");
        fs::remove_file(dir.path().join("ca-cert.pem")).unwrap();
        let refused = TlsDial::new(endpoint(), dir.path()).err().unwrap();
        assert!(refused.to_string().contains("ca-cert.pem"), "{refused}");
        let unix = Endpoint::Unix("/x".into());
        assert!(matches!(
            TlsDial::new(unix, dir.path()),
            Err(TlsError::Endpoint(_))
        ));
    }
}
