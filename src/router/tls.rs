//! TLS on the public listener, where `[router] tls_cert` and `tls_key` are given.
//!
//! ```text
//! start:       both files ─▶ configuration        (cannot be used: no start)
//! running:     a file changed ─▶ read both again ─▶ configuration  (cannot be used: the old one stays, and it is logged)
//! connection:  TCP ─▶ handshake, at most HANDSHAKE ─▶ HTTP/1.1
//! ```
//!
//! A connection keeps the certificate that it began with. Between the change of one file and that of the other the two
//! do not fit each other: the old pair stays until they do.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::private_file::{Stamp, read_open, read_private};
use crate::topology::TlsFiles;

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(1);
/// A client that takes longer is gone, or means no good.
const HANDSHAKE: Duration = Duration::from_secs(10);
const PROTOCOL: &[u8] = b"http/1.1";

/// Why a certificate and its key cannot be used. Never shows the key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not PEM: {source}", path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{} has no certificate; it begins with -----BEGIN CERTIFICATE-----", path.display())]
    NoCertificate { path: PathBuf },
    #[error("the certificate in {} and the key in {} cannot be used together", files.cert.display(), files.key.display())]
    Unusable {
        files: TlsFiles,
        source: rustls::Error,
    },
}

/// The certificate that is shown to clients now. Cheap to clone; clones share it.
#[derive(Debug, Clone)]
pub struct Tls {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    files: TlsFiles,
    config: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    pub fn open(files: &TlsFiles) -> Result<Self, TlsError> {
        let shared = Shared {
            config: RwLock::new(load(files)?),
            files: files.clone(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Reads the files again whenever one of them changed, for ever.
    pub(super) async fn follow(self) {
        let files = &self.shared.files;
        let look = || (Stamp::of(&files.cert), Stamp::of(&files.key));
        let mut seen = look();
        loop {
            sleep(LOOK).await;
            let now = look();
            if now == seen {
                continue;
            }
            seen = now;
            match load(files) {
                Ok(config) => {
                    tracing::info!(file = %files.cert.display(), "the certificate was read again");
                    let current = self.shared.config.write();
                    *current.unwrap_or_else(PoisonError::into_inner) = config;
                }
                Err(error) => {
                    let error = anyhow::Error::new(error);
                    tracing::warn!("the certificate stays as it was: {error:#}");
                }
            }
        }
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = self.shared.config.read();
        let config = config.unwrap_or_else(PoisonError::into_inner).clone();
        match timeout(HANDSHAKE, TlsAcceptor::from(config).accept(stream)).await {
            Ok(accepted) => accepted,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

fn load(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let certificates = read_open(&files.cert).map_err(|source| TlsError::Read {
        path: files.cert.clone(),
        source,
    })?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(certificates.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|source| TlsError::Pem {
            path: files.cert.clone(),
            source,
        })?;
    if certificates.is_empty() {
        let path = files.cert.clone();
        return Err(TlsError::NoCertificate { path });
    }
    let key = read_private(&files.key).map_err(|source| TlsError::Read {
        path: files.key.clone(),
        source,
    })?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|source| TlsError::Pem {
        path: files.key.clone(),
        source,
    })?;
    let unusable = |source| TlsError::Unusable {
        files: files.clone(),
        source,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;

    fn written(folder: &Path, name: &str) -> TlsFiles {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let files = TlsFiles {
            cert: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}.key")),
        };
        fs::write(&files.cert, made.cert.pem()).unwrap();
        fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        files
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_its_file_and_without_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (written(folder.path(), "a"), written(folder.path(), "b"));
        assert!(Tls::open(&a).is_ok());
        let mixed = |cert: &Path, key: &Path| {
            let files = TlsFiles {
                cert: cert.to_owned(),
                key: key.to_owned(),
            };
            Tls::open(&files).unwrap_err()
        };
        assert!(matches!(mixed(&a.cert, &b.key), TlsError::Unusable { .. }));
        assert!(matches!(
            mixed(&a.key, &a.key),
            TlsError::NoCertificate { .. }
        ));
        assert!(matches!(mixed(&a.cert, &a.cert), TlsError::Read { .. }));
        let missing = folder.path().join("missing");
        assert!(matches!(mixed(&missing, &a.key), TlsError::Read { .. }));
        let empty = folder.path().join("empty");
        fs::write(&empty, "").unwrap();
        fs::set_permissions(&empty, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(mixed(&a.cert, &empty), TlsError::Pem { .. }));

        fs::set_permissions(&a.key, fs::Permissions::from_mode(0o644)).unwrap();
        let error = anyhow::Error::new(mixed(&a.cert, &a.key));
        let told = format!("{error:#}");
        assert!(
            told.contains("a.key") && told.contains("chmod o="),
            "{told}"
        );
        let body = fs::read_to_string(&a.key).unwrap();
        let body = body.lines().nth(1).unwrap();
        assert!(!told.contains(body) && !format!("{:?}", Tls::open(&b).unwrap()).contains(body));
    }
}
