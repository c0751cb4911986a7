//! TLS as the client of a node.

use std::io;
use std::sync::Arc;

use http::HeaderValue;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, InvalidMessage, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const PROTOCOL: &[u8] = b"http/1.1";

/// Why there is nobody to trust, or no way to speak TLS to a node.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    #[error("it is not PEM: {0}")]
    Pem(#[source] pem::Error),
    #[error("it has no certificate; one begins with -----BEGIN CERTIFICATE-----")]
    NoCertificate,
    #[error("a certificate in it cannot be used: {0}")]
    Unusable(#[source] rustls::Error),
    #[error(
        "this machine trusts no CA{}; install its CA certificates (the package is often called \
         ca-certificates), set SSL_CERT_FILE, or name the file of the node's CA", .found
    )]
    NoneHere {
        /// What went wrong with them, with a colon before it.
        found: String,
    },
    #[error(
        "{host} is no name that a certificate could be for; write the name that the node's is for"
    )]
    Name { host: String },
    #[error("TLS cannot be set up: {0}")]
    Setup(#[source] rustls::Error),
}

/// Who may vouch for nodes. Cheap to clone: nodes that trust alike share what they learned of each other's sessions.
#[derive(Debug, Clone)]
pub struct Roots {
    config: Arc<ClientConfig>,
}

impl Roots {
    /// Those in a file's text, and nobody else.
    pub fn from_pem(text: &str) -> Result<Self, RootsError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let certificate = certificate.map_err(RootsError::Pem)?;
            roots.add(certificate).map_err(RootsError::Unusable)?;
        }
        match roots.is_empty() {
            true => Err(RootsError::NoCertificate),
            false => Self::new(roots),
        }
    }

    /// Whom this machine trusts: its own certificates, or those of SSL_CERT_FILE and SSL_CERT_DIR.
    pub fn of_machine() -> Result<Self, RootsError> {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        // A machine may have some that no modern client takes.
        let (usable, _) = roots.add_parsable_certificates(found.certs);
        if usable == 0 {
            let first = found.errors.first();
            let found = first.map_or_else(String::new, |error| format!(": {error}"));
            return Err(RootsError::NoneHere { found });
        }
        Self::new(roots)
    }

    fn new(roots: RootCertStore) -> Result<Self, RootsError> {
        // Named, so that it does not depend on which other ones the program was built with.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(RootsError::Setup)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self {
            config: Arc::new(config),
        })
    }
}

/// How TLS is spoken to one node.
#[derive(Debug)]
pub struct NodeTls {
    name: ServerName<'static>,
    host: HeaderValue,
    config: Arc<ClientConfig>,
}

impl NodeTls {
    /// `host`: the name or the IP address that its certificate has to be for. `authority`: with the port.
    pub fn new(host: &str, authority: &str, roots: &Roots) -> Result<Self, RootsError> {
        let no_name = || RootsError::Name {
            host: host.to_owned(),
        };
        Ok(Self {
            name: ServerName::try_from(host.to_owned()).map_err(|_| no_name())?,
            host: HeaderValue::try_from(authority).map_err(|_| no_name())?,
            config: roots.config.clone(),
        })
    }

    pub(super) fn host(&self) -> &HeaderValue {
        &self.host
    }

    /// The handshake, on a connection to the node. The caller sets the time limit.
    pub async fn connect(
        &self,
        stream: TcpStream,
    ) -> Result<Box<TlsStream<TcpStream>>, TlsFailure> {
        let connector = TlsConnector::from(self.config.clone());
        match connector.connect(self.name.clone(), stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(source) => Err(TlsFailure { source }),
        }
    }
}

/// Why the handshake failed.
#[derive(Debug, thiserror::Error)]
#[error("{}", told(source))]
pub struct TlsFailure {
    source: io::Error,
}

fn told(error: &io::Error) -> String {
    let inner = error.get_ref();
    match inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            "nobody who is trusted here has signed its certificate; name the file of its CA (`ca_file`, --node-ca-file)"
                .to_owned()
        }
        // Its type is another crate's; `openssl req -x509` makes such certificates.
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(why)))
            if why.to_string() == "CaUsedAsEndEntity" =>
        {
            "its certificate is a CA's, and no node's; make it one with basicConstraints CA:FALSE"
                .to_owned()
        }
        Some(rustls::Error::InvalidCertificate(why)) => {
            format!("its certificate is refused: {why}")
        }
        Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "it does not speak TLS; is its URL http://?".to_owned()
        }
        _ => format!("the TLS handshake failed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_certificate_vouches_for_nobody() {
        let text = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (text, why) in [
            ("", "no certificate"),
            ("hello", "no certificate"),
            (text, "cannot be used"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n", "not PEM"),
        ] {
            let error = Roots::from_pem(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }

    #[test]
    fn names_and_addresses_can_be_spoken_to() {
        let made = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let roots = Roots::from_pem(&made.cert.pem()).unwrap();
        for host in ["node.local", "10.0.0.7", "::1", "node_1"] {
            assert!(NodeTls::new(host, "x:1", &roots).is_ok(), "{host}");
        }
        assert!(NodeTls::new("a..b", "x:1", &roots).is_err());
    }
}
