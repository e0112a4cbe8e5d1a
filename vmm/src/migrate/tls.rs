//! Connections over TCP that are encrypted, and whose ends prove who they are: TLS 1.3, with a certificate at either end.
//!
//! | module | what it does |
//! |---|---|
//! | `files` | certificates and keys, read and checked before they are used |
//! | `handshake` | both sides of it, and what can be wrong |
//! | `pump` | a thread between a [`Connection`] and the network |
//!
//! Whoever is at the other end has a certificate that the CA has signed. There are no sessions to resume: each connection is
//! verified anew. When the destination has verified the source, it says so with one byte, [`VERIFIED`]: a source whose
//! certificate is refused would otherwise learn that in the middle of the first frames.

mod files;
mod handshake;
mod pump;

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use migration::wire::Connection;
use migration::wire::connection::Limits;
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, ServerConfig,
    ServerConnection, SignatureScheme,
};

pub use files::{Files, LoadError};
pub use handshake::HandshakeError;

/// What a destination says first.
const VERIFIED: u8 = b'V';

/// The end of a source.
#[derive(Clone, Debug)]
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Client {
    /// Reads its files. The destination's certificate has to be for the name in `files`, or for `host`.
    pub fn load(files: &Files, host: &str) -> Result<Self, LoadError> {
        let name = files::name(files.name.as_deref().unwrap_or(host))?;
        let provider = files::provider();
        let loaded = files.load(&provider)?;
        let clients = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&loaded.roots),
            Arc::clone(&provider),
        );
        let clients = clients
            .build()
            .map_err(|error| LoadError::Setup(error.to_string()))?;
        // As the destination will, if it has the same CA and clock.
        loaded
            .check_own(|own, intermediates, now| {
                clients
                    .verify_client_cert(own, intermediates, now)
                    .map(drop)
            })
            .map_err(|why| files.own(why))?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(loaded.roots)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.own)));
        config.resumption = Resumption::disabled();
        Ok(Self {
            config: Arc::new(config),
            name,
        })
    }

    /// Makes a connection of a TCP stream.
    pub fn connect(&self, tcp: TcpStream, limits: Limits) -> io::Result<Connection> {
        let tls = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(io::Error::other)?;
        let mut tls = tls.into();
        handshake::client(&mut tls, &tcp, limits.silence).map_err(io::Error::other)?;
        pump::start(tls, tcp, limits)
    }
}

/// The end of a destination.
#[derive(Clone, Debug)]
pub struct Server {
    config: Arc<ServerConfig>,
}

impl Server {
    /// Reads its files. If there is a name in `files`, the source's certificate has to be for it.
    pub fn load(files: &Files) -> Result<Self, LoadError> {
        let name = files.name.as_deref().map(files::name).transpose()?;
        let provider = files::provider();
        let loaded = files.load(&provider)?;
        let algorithms = provider.signature_verification_algorithms.all;
        loaded
            .check_own(|own, intermediates, now| {
                let own = ParsedCertificate::try_from(own)?;
                rustls::client::verify_server_cert_signed_by_trust_anchor(
                    &own,
                    &loaded.roots,
                    intermediates,
                    now,
                    algorithms,
                )
            })
            .map_err(|why| files.own(why))?;
        let clients = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&loaded.roots),
            Arc::clone(&provider),
        );
        let mut clients = clients
            .build()
            .map_err(|error| LoadError::Setup(error.to_string()))?;
        if let Some(name) = name {
            clients = Arc::new(Named { clients, name });
        }
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.own)));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
        })
    }

    /// Makes a connection of a TCP stream.
    pub fn accept(&self, tcp: TcpStream, limits: Limits) -> io::Result<Connection> {
        let tls = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        let mut tls = tls.into();
        handshake::server(&mut tls, &tcp, limits.silence).map_err(io::Error::other)?;
        pump::start(tls, tcp, limits)
    }
}

/// Verifies certificates of sources that have to have a name.
#[derive(Debug)]
struct Named {
    clients: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .clients
            .verify_client_cert(end_entity, intermediates, now)?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_name(&certificate, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;
