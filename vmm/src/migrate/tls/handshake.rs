//! Both sides of the handshake, and what can be wrong.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, Connection, Error};

use super::VERIFIED;
use super::pump::{Queue, decipher};

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It took too long.
    #[error("TLS: the handshake did not end within {} s", .0.as_secs())]
    Late(Duration),
    /// The other side closed the connection.
    #[error(
        "TLS: the other side hung up during the handshake; is it a `tern` with --tls-cert, whose CA has signed this side's \
         certificate?"
    )]
    HungUp,
    /// No TLS.
    #[error("TLS: the other side does not speak it; is it a `tern` without --tls-cert?")]
    Stranger,
    /// Another version of TLS.
    #[error("TLS: the other side does not speak version 1.3")]
    Version,
    /// A certificate that is not accepted.
    #[error("TLS: the other side's certificate {0}")]
    Certificate(String),
    /// None was sent.
    #[error("TLS: the other side has no certificate")]
    NoCertificate,
    /// This side's certificate is not accepted.
    #[error("TLS: the other side refuses this side's certificate: {0}")]
    Refused(String),
    /// Something else.
    #[error("TLS: {0}")]
    Other(String),
    /// The socket.
    #[error("TLS: {0}")]
    Io(#[from] io::Error),
}

/// The source's side. Ends when the destination has verified its certificate.
pub(super) fn client(
    tls: &mut Connection,
    tcp: &TcpStream,
    limit: Duration,
) -> Result<(), HandshakeError> {
    let mut shake = Shake::new(tls, tcp, limit)?;
    shake.until(|tls| !tls.is_handshaking())?;
    let mut word = [0];
    let mut heard = false;
    shake.until(|tls| {
        heard = heard || matches!(tls.reader().read(&mut word), Ok(1));
        heard
    })?;
    if word != [VERIFIED] {
        return Err(HandshakeError::Stranger);
    }
    Ok(())
}

/// The destination's side.
pub(super) fn server(
    tls: &mut Connection,
    tcp: &TcpStream,
    limit: Duration,
) -> Result<(), HandshakeError> {
    let mut shake = Shake::new(tls, tcp, limit)?;
    shake.until(|tls| !tls.is_handshaking())?;
    shake.tls.writer().write_all(&[VERIFIED])?;
    shake.until(|tls| !tls.wants_write())
}

struct Shake<'a> {
    tls: &'a mut Connection,
    tcp: &'a TcpStream,
    limit: Duration,
    deadline: Instant,
    cipher: Queue,
}

impl<'a> Shake<'a> {
    fn new(tls: &'a mut Connection, tcp: &'a TcpStream, limit: Duration) -> io::Result<Self> {
        tcp.set_nonblocking(true)?;
        // What is written is bounded by whoever writes.
        tls.set_buffer_limit(None);
        Ok(Self {
            tls,
            tcp,
            limit,
            deadline: Instant::now() + limit,
            cipher: Queue::new(),
        })
    }

    /// Goes on until `done`.
    fn until(
        &mut self,
        mut done: impl FnMut(&mut Connection) -> bool,
    ) -> Result<(), HandshakeError> {
        loop {
            let mut wanted = PollFlags::IN;
            if self.write()? {
                wanted |= PollFlags::OUT;
            }
            if done(self.tls) {
                return Ok(());
            }
            if !self.read()? {
                self.wait(wanted)?;
            }
        }
    }

    /// Sends what is to be sent. True if there is no room for the rest.
    fn write(&mut self) -> io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &*self.tcp) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                // Why may be among what was said before.
                Err(error) if gone(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Reads what has come. False if there is nothing.
    fn read(&mut self) -> Result<bool, HandshakeError> {
        match (&*self.tcp).read(self.cipher.space()) {
            Ok(0) => return Err(HandshakeError::HungUp),
            Ok(count) => self.cipher.filled(count),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => return Ok(false),
                ErrorKind::Interrupted => return Ok(true),
                _ if gone(&error) => return Err(HandshakeError::HungUp),
                _ => return Err(error.into()),
            },
        }
        while !self.cipher.is_empty() {
            if let Err(error) = decipher(self.tls, &mut self.cipher) {
                // So that the other side learns why.
                let _ = self.write();
                let _ = self.tcp.shutdown(std::net::Shutdown::Write);
                return Err(explained(error));
            }
        }
        Ok(true)
    }

    fn wait(&self, wanted: PollFlags) -> Result<(), HandshakeError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HandshakeError::Late(self.limit));
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.tcp, wanted)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted
    )
}

fn explained(error: Error) -> HandshakeError {
    match error {
        Error::InvalidCertificate(error) => HandshakeError::Certificate(why(&error)),
        Error::NoCertificatesPresented => HandshakeError::NoCertificate,
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => HandshakeError::Stranger,
        Error::PeerIncompatible(_) => HandshakeError::Version,
        Error::AlertReceived(alert) => refused(alert),
        Error::PeerMisbehaved(_) => HandshakeError::Other(
            "the other side does not keep to the protocol; is it a `tern`, with nothing in between that changes bytes?"
                .to_owned(),
        ),
        Error::DecryptError | Error::PeerSentOversizedRecord => HandshakeError::Other(
            "what came is not what the other side sent, or it is no TLS; does something in between change bytes?".to_owned(),
        ),
        Error::FailedToGetCurrentTime => {
            HandshakeError::Other("the time of day is not known; set this host's clock".to_owned())
        }
        other => HandshakeError::Other(other.to_string()),
    }
}

/// What an alert of the other side means.
fn refused(alert: AlertDescription) -> HandshakeError {
    let why = match alert {
        AlertDescription::UnknownCA => "its CA (--tls-ca) has not signed it",
        AlertDescription::DecryptError => {
            "its CA (--tls-ca) has not signed it, but one of the same name that has another key"
        }
        AlertDescription::CertificateExpired => {
            "by its clock, the certificate has expired or is not valid yet"
        }
        AlertDescription::BadCertificate => {
            "the certificate is not for the name it wants (--tls-name), or damaged"
        }
        AlertDescription::UnsupportedCertificate => {
            "its extended key usage does not allow that; a source's has to allow clientAuth, a destination's serverAuth"
        }
        AlertDescription::CertificateRequired => "there is none",
        AlertDescription::CertificateRevoked => "it was revoked",
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
            "what is wrong with it is said there"
        }
        AlertDescription::ProtocolVersion => return HandshakeError::Version,
        AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity => {
            return HandshakeError::Other(
                "both sides have no algorithm in common; use keys for ECDSA (P-256, P-384), Ed25519 or RSA".to_owned(),
            );
        }
        other => {
            return HandshakeError::Other(format!(
                "the other side broke off the handshake and says why itself (alert {})",
                u8::from(other)
            ));
        }
    };
    HandshakeError::Refused(why.to_owned())
}

/// What is wrong with a certificate, after "the certificate".
pub(super) fn why(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired => "has expired".to_owned(),
        CertificateError::ExpiredContext { time, not_after } => {
            format!("expired at {}; now it is {}", date(*not_after), date(*time))
        }
        CertificateError::NotValidYet => "is not valid yet".to_owned(),
        CertificateError::NotValidYetContext { time, not_before } => {
            let (now, begin) = (date(*time), date(*not_before));
            format!("is not valid before {begin}; now it is {now}: is this host's clock right?")
        }
        CertificateError::UnknownIssuer => {
            "was not signed by the CA (--tls-ca), or intermediate certificates are missing"
                .to_owned()
        }
        CertificateError::BadSignature => {
            "was not signed by the CA (--tls-ca), but by one of the same name that has another key"
                .to_owned()
        }
        CertificateError::NotValidForName => {
            "is for another name; say which (--tls-name)".to_owned()
        }
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => other_name(expected, presented),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "has an extended key usage that does not allow that; a source's has to allow clientAuth, a destination's \
             serverAuth"
                .to_owned()
        }
        CertificateError::BadEncoding => "is damaged, or no X.509 certificate of version 3".to_owned(),
        CertificateError::Revoked => "was revoked; make another one".to_owned(),
        CertificateError::UnhandledCriticalExtension => CRITICAL.to_owned(),
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "is signed with an algorithm that is not accepted; sign it with ECDSA (P-256, P-384), Ed25519 or RSA, and SHA-256 \
             or more"
                .to_owned()
        }
        CertificateError::Other(error) => unnamed(&error.to_string()),
        other => unnamed(&other.to_string()),
    }
}

const CRITICAL: &str = "has a critical extension that is not understood here; make one without";

/// What is wrong with a certificate, for which the library has only a name of its own.
fn unnamed(name: &str) -> String {
    let why = match name {
        "CaUsedAsEndEntity" => {
            "is that of a CA, which no host can use as its own; have the CA sign one for the host (docs/migration-protocol.md \
             says how), and name that"
        }
        "EndEntityUsedAsCa" => {
            "was signed by a certificate that is not that of a CA; sign it with one that has CA:TRUE, and name that with \
             --tls-ca"
        }
        "PathLenConstraintViolated" | "MaximumPathDepthExceeded" => {
            "has more intermediate certificates before it than its CA allows; have the CA sign it itself"
        }
        "NameConstraintViolation" => {
            "is for a name that its CA may not sign; use another CA, or another name"
        }
        "UnsupportedCriticalExtension" => CRITICAL,
        "UnsupportedCertVersion" => "is no X.509 certificate of version 3; make one that is",
        "EmptyEkuExtension" => {
            "has an extended key usage that allows nothing; a source's has to allow clientAuth, a destination's serverAuth"
        }
        // Names only: `printable` keeps whatever is in a certificate from the terminal.
        name => return format!("is not accepted ({}); make another one", printable(name)),
    };
    why.to_owned()
}

/// The beginning of `text`, as text.
fn printable(text: &str) -> String {
    text.escape_default().take(100).collect()
}

fn other_name(expected: &ServerName<'_>, presented: &[String]) -> String {
    const SHOWN: usize = 5;
    let expected = expected.to_str();
    if presented.is_empty() {
        return format!(
            "is not for {expected}: it has no subjectAltName; make one that has, and name it with --tls-name"
        );
    }
    // They are the other side's words, and come as in `DnsName("b.example")`.
    let names: Vec<_> = presented
        .iter()
        .take(SHOWN)
        .map(|name| name.strip_prefix("DnsName(\"").unwrap_or(name))
        .map(|name| name.strip_suffix("\")").unwrap_or(name))
        .map(printable)
        .collect();
    let more = if presented.len() > SHOWN { ", …" } else { "" };
    format!(
        "is not for {expected} but for {}{more}; if that is whom you mean, say so with --tls-name",
        names.join(", ")
    )
}

/// A moment, for people.
fn date(time: UnixTime) -> String {
    let moment = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(time.as_secs()));
    let mut text = String::new();
    match moment {
        Some(moment) if write!(text, "{}", humantime::format_rfc3339_seconds(moment)).is_ok() => {
            text
        }
        _ => "a time far away".to_owned(),
    }
}
