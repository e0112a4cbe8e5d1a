//! Certificates and keys, read and checked before they are used.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, Error, InconsistentKeys, RootCertStore};
use serde::{Deserialize, Serialize};

use super::handshake::why;
use crate::boot::load::explain;

/// No file is longer.
const MAX_FILE: u64 = 1 << 20;

/// The files that say who this side is and whom it trusts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// This side's certificate in PEM, followed by intermediate ones if there are any.
    pub cert: PathBuf,
    /// Its private key in PEM.
    pub key: PathBuf,
    /// The CA that signs the certificates of both sides, in PEM.
    pub ca: PathBuf,
    /// The name in the other side's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// What an option names.
    #[error("{option}: {source}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong.
        source: Box<LoadError>,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {}", path.display(), explain(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that is none of these.
    #[error("{} is longer than any certificate or key: more than {MAX_FILE} bytes", .0.display())]
    TooLong(PathBuf),
    /// Nothing of the kind is in a file.
    #[error("{}: no {what} in PEM is in it{found}; it has to begin with -----BEGIN {begin}-----", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// What should be.
        what: &'static str,
        /// What is there instead.
        found: &'static str,
        /// How that begins.
        begin: &'static str,
    },
    /// A file that is damaged.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A key that has a password.
    #[error(
        "{path} is protected by a password, which nobody could be asked for; write it without one, where nobody else can \
         read it: `openssl pkey -in {path} -out FILE`", path = .0.display()
    )]
    Password(PathBuf),
    /// A key that others know.
    #[error(
        "{path} can be read or written by everybody, so that anybody could be this side; `chmod o= {path}`, and if it is \
         not new, make another one", path = .0.display()
    )]
    Exposed(PathBuf),
    /// A key that is not understood.
    #[error("{}: {why}; use a key for ECDSA (P-256, P-384), Ed25519 or RSA", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A key of something else.
    #[error("the key in {} is not that of the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        cert: PathBuf,
    },
    /// A certificate that the other side would refuse.
    #[error("the certificate in {} {why} (the CA is that in {})", cert.display(), ca.display())]
    Own {
        /// The file.
        cert: PathBuf,
        /// That of the CA.
        ca: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No name.
    #[error(
        "'{0}' is no name of a host and no address, as certificates have them; give the name in the other side's \
         certificate (--tls-name)"
    )]
    Name(String),
    /// It cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

impl LoadError {
    /// It is about what `option` names.
    fn of(self, option: &'static str) -> Self {
        Self::Option {
            option,
            source: Box::new(self),
        }
    }
}

impl From<Error> for LoadError {
    fn from(error: Error) -> Self {
        Self::Setup(error.to_string())
    }
}

/// What was in the files.
pub(super) struct Loaded {
    pub(super) own: CertifiedKey,
    pub(super) roots: Arc<RootCertStore>,
}

/// The algorithms.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A name as certificates have them.
pub(super) fn name(text: &str) -> Result<ServerName<'static>, LoadError> {
    ServerName::try_from(text.to_owned()).map_err(|_| LoadError::Name(text.to_owned()))
}

impl Files {
    /// The same with absolute paths.
    pub fn absolute(self) -> io::Result<Self> {
        Ok(Self {
            cert: std::path::absolute(self.cert)?,
            key: std::path::absolute(self.key)?,
            ca: std::path::absolute(self.ca)?,
            name: self.name,
        })
    }

    pub(super) fn load(&self, provider: &CryptoProvider) -> Result<Loaded, LoadError> {
        let mut roots = RootCertStore::empty();
        let ca = |error: LoadError| error.of("--tls-ca");
        for certificate in certificates(&self.ca).map_err(ca)? {
            roots
                .add(certificate)
                .map_err(|error| ca(damaged(&self.ca, &error)))?;
        }
        let chain = certificates(&self.cert).map_err(|error| error.of("--tls-cert"))?;
        let read = key(&self.key).map_err(|error| error.of("--tls-key"))?;
        let key = provider
            .key_provider
            .load_private_key(read)
            .map_err(|error| {
                let key = LoadError::Key {
                    path: self.key.clone(),
                    why: told(&error),
                };
                key.of("--tls-key")
            })?;
        let own = CertifiedKey::new(chain, key);
        match own.keys_match() {
            Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(Error::InconsistentKeys(_)) => {
                return Err(LoadError::Mismatch {
                    key: self.key.clone(),
                    cert: self.cert.clone(),
                });
            }
            Err(error) => return Err(damaged(&self.cert, &error).of("--tls-cert")),
        }
        Ok(Loaded {
            own,
            roots: Arc::new(roots),
        })
    }

    /// What is wrong with this side's certificate.
    pub(super) fn own(&self, error: Error) -> LoadError {
        LoadError::Own {
            cert: self.cert.clone(),
            ca: self.ca.clone(),
            why: told(&error),
        }
    }
}

impl Loaded {
    /// Verifies this side's own certificate.
    pub(super) fn check_own(
        &self,
        verify: impl FnOnce(
            &CertificateDer<'static>,
            &[CertificateDer<'static>],
            UnixTime,
        ) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self.own.cert.split_first() {
            Some((own, intermediates)) => verify(own, intermediates, UnixTime::now()),
            None => Err(Error::NoCertificatesPresented),
        }
    }
}

fn told(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => why(error),
        Error::General(why) => why.clone(),
        other => other.to_string(),
    }
}

fn damaged(path: &Path, error: &Error) -> LoadError {
    let why = match error {
        Error::InvalidCertificate(CertificateError::BadEncoding) => {
            "what is between BEGIN and END is no X.509 certificate of version 3".to_owned()
        }
        other => told(other),
    };
    LoadError::Damaged {
        path: path.to_owned(),
        why,
    }
}

/// Reads a file; `check` is asked about it before.
fn read(
    path: &Path,
    check: impl FnOnce(&std::fs::Metadata) -> Result<(), LoadError>,
) -> Result<Vec<u8>, LoadError> {
    let failed = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    check(&file.metadata().map_err(failed)?)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(LoadError::TooLong(path.to_owned()));
    }
    Ok(bytes)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let bytes = read(path, |_| Ok(()))?;
    let all: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| malformed(path, &error))?;
    if all.is_empty() {
        let found = if PrivateKeyDer::from_pem_slice(&bytes).is_ok() {
            ", but a private key"
        } else {
            ""
        };
        return Err(LoadError::Nothing {
            path: path.to_owned(),
            what: "certificate",
            found,
            begin: "CERTIFICATE",
        });
    }
    Ok(all)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, LoadError> {
    let bytes = read(path, |file| {
        if file.permissions().mode() & 0o006 != 0 {
            return Err(LoadError::Exposed(path.to_owned()));
        }
        Ok(())
    })?;
    let has = |text: &[u8]| bytes.windows(text.len()).any(|part| part == text);
    // The second is how openssl wrote them before PKCS #8.
    if has(b"BEGIN ENCRYPTED PRIVATE KEY") || has(b"Proc-Type: 4,ENCRYPTED") {
        return Err(LoadError::Password(path.to_owned()));
    }
    match PrivateKeyDer::from_pem_slice(&bytes) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) => Err(LoadError::Nothing {
            path: path.to_owned(),
            what: "private key",
            found: if has(b"BEGIN CERTIFICATE") {
                ", but a certificate"
            } else {
                ""
            },
            begin: "PRIVATE KEY",
        }),
        Err(error) => Err(malformed(path, &error)),
    }
}

fn malformed(path: &Path, error: &pem::Error) -> LoadError {
    let why = match error {
        pem::Error::MissingSectionEnd { .. } => "its -----END line is missing".to_owned(),
        pem::Error::IllegalSectionStart { .. } => "a -----BEGIN line is cut off".to_owned(),
        pem::Error::Base64Decode(_) => "what is between BEGIN and END is not base64".to_owned(),
        other => other.to_string(),
    };
    LoadError::Damaged {
        path: path.to_owned(),
        why,
    }
}
