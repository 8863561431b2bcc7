//! TLS 1.3 connections with certificates at both ends.

mod read_ahead;

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme, StreamOwned,
};

use self::read_ahead::ReadAhead;
use crate::link::{Accept, Closer, Dial, Endpoint, Listener, Stream};

/// Bytes that a session encrypts before they are written, twice as many as by default: more of them fall
/// out of the CPU's cache before they are sent.
const BUFFER: usize = 128 << 10;

/// Bytes of a file of certificates, or of a key.
const MOST_BYTES: u64 = 1 << 20;

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
    /// A name that no certificate can have.
    #[error("{0:?} is neither a host name nor an address that a certificate can contain")]
    Name(String),
    /// Every host with a certificate of the CA could send a VM.
    #[error(
        "no peer is allowed to send: name the hosts that may, as in their certificates, or `*` \
         for every host with a certificate of the CA"
    )]
    NoPeers,
    /// Only TCP is encrypted: what goes over a unix socket stays on the host.
    #[error("{0} cannot be encrypted with TLS: only `tcp:HOST:PORT` can")]
    Endpoint(Endpoint),
}

fn read(dir: &Path, name: &str) -> Result<(PathBuf, Vec<u8>), TlsError> {
    let path = dir.join(name);
    match read_regular(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(error) => Err(TlsError::File {
            path,
            why: error.to_string(),
        }),
    }
}

/// Reads a regular file. A client chooses the directory: the open does not wait for the writer of a FIFO, and
/// what is read is bounded.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(invalid("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    if file.take(MOST_BYTES + 1).read_to_end(&mut bytes)? as u64 > MOST_BYTES {
        return Err(invalid("it has more than 1 MiB"));
    }
    Ok(bytes)
}

fn certificates(dir: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (path, bytes) = read(dir, name)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(TlsError::File {
            path,
            why: "it contains no certificate".to_owned(),
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
struct TlsStream<C>(StreamOwned<C, ReadAhead>);

impl Read for TlsStream<ClientConnection> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0.read(data)
    }
}

impl Write for TlsStream<ClientConnection> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(parts)
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

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<C: Send> Stream for TlsStream<C>
where
    Self: Read + Write,
{
    fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        self.0.sock.limit_unsent(bytes)
    }

    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.0.sock.set_patience(patience)
    }

    fn closer(&self) -> io::Result<Closer> {
        // The socket, not the TLS session: another thread may wait inside the session. The peer
        // gets no `close_notify`, and sees an unexpected end of the stream.
        self.0.sock.closer()
    }

    fn read_closer(&self) -> io::Result<Closer> {
        self.0.sock.read_closer()
    }
}

/// Connects and authenticates the peer: `ca-cert.pem` must have signed its certificate, which must name the
/// host. Presents `client-cert.pem` with the key in `client-key.pem`.
pub struct TlsDial {
    endpoint: Endpoint,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
}

impl TlsDial {
    /// With the files of a directory.
    ///
    /// # Errors
    /// Fails if one is missing or they do not belong together, or the endpoint is no TCP port.
    pub fn new(endpoint: Endpoint, dir: &Path) -> Result<Self, TlsError> {
        let Endpoint::Tcp(place) = &endpoint else {
            return Err(TlsError::Endpoint(endpoint));
        };
        let host = place
            .rsplit_once(':')
            .map_or(place.as_str(), |(host, _)| host);
        // `ServerName` takes an IPv6 address without brackets.
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
        // No handshake yet: it runs with the first write, under the timeout that the caller sets.
        let mut connection = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(BUFFER));
        let stream = StreamOwned::new(connection, ReadAhead::new(stream));
        Ok(Box::new(TlsStream(stream)))
    }
}

/// The sources that a destination accepts: of the hosts whose certificates the CA signed, those that
/// have one of these names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerNames {
    /// Any host whose certificate the CA signed.
    Any,
    /// Hosts with a certificate that names one of these as its subject alternative name.
    Named(Vec<ServerName<'static>>),
}

impl PeerNames {
    /// Reads host names and IP addresses; `*` stands for every host.
    ///
    /// # Errors
    /// The list is empty, or a name cannot be in a certificate.
    pub fn new<S: AsRef<str>>(names: &[S]) -> Result<Self, TlsError> {
        if names.iter().any(|name| name.as_ref() == "*") {
            return Ok(Self::Any);
        }
        let names = names.iter().map(|name| {
            let name = name.as_ref().to_owned();
            ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name))
        });
        let names = names.collect::<Result<Vec<_>, _>>()?;
        if names.is_empty() {
            return Err(TlsError::NoPeers);
        }
        Ok(Self::Named(names))
    }

    fn admit(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let Self::Named(names) = self else {
            return Ok(());
        };
        let parsed = ParsedCertificate::try_from(certificate)?;
        let mut last = None;
        for name in names {
            match verify_server_name(&parsed, name) {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        // Its text has the names that the certificate does have; the peer learns none of this.
        tracing::warn!(
            error = last.map(tracing::field::display),
            "a peer was refused: its certificate has none of the allowed names"
        );
        // The alert is `access_denied`.
        let refused = CertificateError::ApplicationVerificationFailure;
        Err(rustls::Error::InvalidCertificate(refused))
    }
}

/// Verifies a client's certificate by its issuer, and then its name.
#[derive(Debug)]
struct NamedClients {
    issued: Arc<dyn ClientCertVerifier>,
    peers: PeerNames,
}

impl ClientCertVerifier for NamedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.issued.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        // The issuer first: a name in a certificate that the CA did not sign proves nothing.
        let verified = self
            .issued
            .verify_client_cert(end_entity, intermediates, now)?;
        self.peers.admit(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.issued
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.issued
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.issued.supported_verify_schemes()
    }
}

/// Accepts connections of hosts whose certificate `ca-cert.pem` signed, and that may send by their
/// names. Presents `server-cert.pem` with the key in `server-key.pem`.
pub struct TlsListener {
    listener: Listener,
    config: Arc<ServerConfig>,
}

impl TlsListener {
    /// With the files of a directory.
    ///
    /// # Errors
    /// Fails if one is missing or they do not belong together, or the endpoint is no TCP port.
    pub fn new(listener: Listener, dir: &Path, peers: PeerNames) -> Result<Self, TlsError> {
        if let Listener::Unix(socket) = &listener {
            return Err(TlsError::Endpoint(Endpoint::Unix(socket.path().to_owned())));
        }
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(dir)?), provider.clone())
                .build()
                .map_err(|error| config(&error))?;
        let verifier = Arc::new(NamedClients {
            issued: verifier,
            peers,
        });
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
        let mut connection =
            ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(BUFFER));
        // Who it is becomes known with the first bytes, which are read elsewhere.
        let stream = StreamOwned::new(connection, ReadAhead::new(stream));
        Ok(Some(Box::new(TlsStream(stream))))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::thread;

    use super::*;
    use crate::testing::Issuer;

    fn directory(trusted: &Issuer, signed_by: &Issuer, host: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        trusted.equip(dir.path(), host, signed_by);
        dir
    }

    fn only(name: &str) -> PeerNames {
        PeerNames::new(&[name]).unwrap()
    }

    /// Sends five bytes, and returns the results of both sides.
    fn send(client: &Path, server: &Path) -> (io::Result<()>, io::Result<[u8; 5]>) {
        send_to(client, server, only("127.0.0.1"))
    }

    fn send_to(
        client: &Path,
        server: &Path,
        peers: PeerNames,
    ) -> (io::Result<()>, io::Result<[u8; 5]>) {
        let listener = Listener::bind(&Endpoint::Tcp("127.0.0.1:0".to_owned())).unwrap();
        let endpoint = listener.endpoint().unwrap();
        let mut listener = TlsListener::new(listener, server, peers).unwrap();
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
    fn files_are_bounded_and_not_waited_for() {
        let issuer = Issuer::new();
        let dir = directory(&issuer, &issuer, "127.0.0.1");
        let path = dir.path().join("ca-cert.pem");
        let dial = || {
            let endpoint = Endpoint::Tcp("127.0.0.1:1".to_owned());
            TlsDial::new(endpoint, dir.path()).map(drop)
        };
        dial().unwrap();
        fs::remove_file(&path).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, Mode::RUSR, 0).unwrap();
        let refused = dial().unwrap_err().to_string();
        assert!(refused.contains("not a regular file"), "{refused}");
        fs::remove_file(&path).unwrap();
        File::create(&path)
            .unwrap()
            .set_len(MOST_BYTES + 1)
            .unwrap();
        let refused = dial().unwrap_err().to_string();
        assert!(refused.contains("more than 1 MiB"), "{refused}");
    }

    #[test]
    fn only_trusted_peers_connect() {
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

    /// The same CA signed all of these certificates.
    #[test]
    fn rejects_peer_with_other_name() {
        let ours = Issuer::new();
        let (here, there) = (
            directory(&ours, &ours, "127.0.0.1"),
            directory(&ours, &ours, "host-c.example"),
        );
        let (said, heard) = send_to(there.path(), here.path(), only("host-a.example"));
        // TLS 1.3: a client gets the alert with its first read.
        let said = said.unwrap_err().to_string();
        assert!(said.contains("AccessDenied"), "{said}");
        assert!(heard.unwrap_err().to_string().contains("certificate"));
        let several = PeerNames::new(&["host-a.example", "host-c.example"]).unwrap();
        for peers in [several, only("*")] {
            let (said, heard) = send_to(there.path(), here.path(), peers);
            said.unwrap();
            assert_eq!(&heard.unwrap(), b"hello");
        }
    }

    #[test]
    fn names_of_peers_are_checked() {
        assert!(matches!(
            PeerNames::new::<&str>(&[]),
            Err(TlsError::NoPeers)
        ));
        let refused = PeerNames::new(&["host-a", "a host"]).unwrap_err();
        assert!(refused.to_string().contains("a host"), "{refused}");
        for good in ["host-a", "10.0.0.1", "fd00::1", "a.example.org"] {
            assert!(matches!(only(good), PeerNames::Named(_)), "{good}");
        }
    }

    #[test]
    fn names_unusable_files() {
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
