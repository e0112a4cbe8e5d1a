//! Guests that are moved over TCP, between processes with certificates.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use super::{Moved, move_into, receive};
use crate::load::{Guest, Load};
use crate::trial;
use crate::vm::{PATIENCE, Running};

pub fn trials() -> Vec<Trial> {
    vec![trial("migrate::tls_keeps_strangers_out", strangers)]
}

/// A CA, with a certificate for this host.
pub struct Authority {
    directory: TempDir,
}

impl Authority {
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let mut params = CertificateParams::new([])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        std::fs::write(path("ca.pem"), params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate()?;
        let own = CertificateParams::new(["127.0.0.1".to_owned()])?;
        std::fs::write(path("own.pem"), own.signed_by(&key, &issuer)?.pem())?;
        std::fs::write(path("own.key"), key.serialize_pem())?;
        std::fs::set_permissions(
            path("own.key"),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )?;
        Ok(Self { directory })
    }

    fn options(&self) -> Vec<String> {
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        vec![
            "--tls-cert".to_owned(),
            path("own.pem"),
            "--tls-key".to_owned(),
            path("own.key"),
            "--tls-ca".to_owned(),
            path("ca.pem"),
        ]
    }

    /// A process that waits for a guest, and its address.
    fn receive(&self, socket: &Path) -> Result<(Running, String)> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = free.local_addr()?.port();
        drop(free);
        let address = format!("tcp:127.0.0.1:{port}");
        let options = self.options();
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let mut next = receive(&address, socket, &options)?;
        let deadline = Instant::now() + PATIENCE;
        // Somebody who connects and hangs up is nobody to wait for.
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            next.expect_alive()?;
            ensure!(Instant::now() < deadline, "nobody listens at {address}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok((next, address))
    }

    /// Moves a guest into a new process. It opens the same disks, and locks them when the source has let go of them.
    pub fn move_to(
        &self,
        guest: Guest,
        directory: &Path,
        number: u32,
        options: &[&str],
    ) -> Result<Moved> {
        let socket = directory.join(format!("api-{number}.sock"));
        let (next, address) = self.receive(&socket)?;
        let tls = self.options();
        let words: Vec<_> = std::iter::once(address.as_str())
            .chain(tls.iter().map(String::as_str))
            .chain(options.iter().copied())
            .collect();
        move_into("running", guest, next, socket, &words)
    }
}

/// A source without a certificate, one with that of another CA and a destination nobody trusts: the guest stays, the reason
/// is said, and the destination goes on waiting for somebody it knows.
fn strangers() -> Result<()> {
    let (ours, theirs) = (Authority::new()?, Authority::new()?);
    let load = Load::new(1)?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let socket = load.path("there.sock");
    let (mut next, address) = ours.receive(&socket)?;
    let other = theirs.options();
    let other: Vec<_> = other.iter().map(String::as_str).collect();
    let cases: [(&[&str], &str); 3] = [
        (&[], "--tls-cert"),
        (&["--insecure"], "the guest stays here"),
        (&other, "was not signed by the CA"),
    ];
    for (options, says) in cases {
        let words = [&[address.as_str()], options].concat();
        guest.control.refuse("migrate", &words, &[says])?;
        guest.ticks(1)?;
        next.expect_alive()?;
    }
    let words = [vec![address], ours.options()].concat();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let mut moved = move_into("running", guest, next, PathBuf::from(&socket), &words)?;
    moved.guest.ticks(1)?;
    moved.guest.enough().map(drop)
}
