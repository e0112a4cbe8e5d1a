//! Certificates on the command line.

use std::path::PathBuf;

use clap::Args;

use crate::migrate::tls::Files;

/// How to make certificates.
pub const EXAMPLE: &str = "\
Certificates for tcp:, which are made once (docs/migration-protocol.md says how):
  tern receive tcp:0.0.0.0:7000 --tls-cert b.pem --tls-key b.key --tls-ca ca.pem
  tern migrate --api-socket here.sock tcp:b.example:7000 --tls-cert a.pem --tls-key a.key --tls-ca ca.pem";

/// The options for a connection over TCP that is encrypted, and whose ends prove who they are.
#[derive(Debug, Args)]
pub struct Tls {
    /// Certificate of this side, in PEM, for a tcp: address
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,

    /// Its private key, in PEM, without a password
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Certificate, in PEM, of the CA that has signed those of both sides
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,

    /// Name or address in the other side's certificate [default: at the source the host of ADDR, at the destination any]
    #[arg(long, value_name = "NAME", requires = "tls_cert")]
    tls_name: Option<String>,
}

impl Tls {
    /// The files, if there are any.
    pub fn files(self) -> Option<Files> {
        Some(Files {
            cert: self.tls_cert?,
            key: self.tls_key?,
            ca: self.tls_ca?,
            name: self.tls_name,
        })
    }
}
