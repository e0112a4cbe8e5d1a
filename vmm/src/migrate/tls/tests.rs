//! Both ends in one process, with certificates made on the spot.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use migration::wire::connection::{Limits, Section};
use migration::wire::{Connection, Message, Received, WireError};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use tempfile::TempDir;

use super::*;

/// A CA, and the files of those it signs.
struct Ca {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        Self::named("ours")
    }

    fn named(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self {
            directory,
            issuer: Issuer::new(params, key),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Signs a certificate for `host`.
    fn sign(&self, host: &str, adjust: impl FnOnce(&mut CertificateParams)) -> Files {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        adjust(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (cert, secret) = (
            self.path(&format!("{host}.pem")),
            self.path(&format!("{host}.key")),
        );
        std::fs::write(&cert, certificate.pem()).unwrap();
        std::fs::write(&secret, key.serialize_pem()).unwrap();
        private(&secret);
        Files {
            cert,
            key: secret,
            ca: self.path("ca.pem"),
            name: None,
        }
    }

    fn plain(&self, host: &str) -> Files {
        self.sign(host, |_| {})
    }
}

fn private(path: &std::path::Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Two ends of a TCP connection.
fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

fn limits() -> Limits {
    Limits {
        silence: Duration::from_secs(20),
        ..Limits::default()
    }
}

type Ends = (io::Result<Connection>, io::Result<Connection>);

/// The outcome of a handshake at either end.
fn shake(client: &Client, server: &Server) -> Ends {
    let (here, there) = pair();
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| server.accept(there, limits()));
        let connected = client.connect(here, limits());
        (connected, accepted.join().unwrap())
    })
}

/// How the handshake of a good pair ends.
fn good() -> (Connection, Connection) {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (here, there) = shake(&client, &server);
    (here.unwrap(), there.unwrap())
}

fn expect(outcome: io::Result<Connection>, says: &str) {
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains(says), "{error:?} does not say {says:?}");
}

fn expect_load(outcome: Result<Server, LoadError>, says: &[&str]) {
    let error = outcome.unwrap_err().to_string();
    for says in says {
        assert!(error.contains(says), "{error:?} does not say {says:?}");
    }
}

/// Sends sections of a MiB each, and receives as many.
fn exchange(end: &mut Connection, count: usize, first: bool) {
    let send = |end: &mut Connection| {
        for number in 0..count {
            end.send_section(&Section {
                name: format!("s{number}"),
                version: 1,
                bytes: vec![number as u8; 1 << 20],
            })
            .unwrap();
        }
    };
    if first {
        send(end);
    }
    for number in 0..count {
        match end.receive().unwrap() {
            Received::Section(section) => {
                assert_eq!(section.name, format!("s{number}"));
                assert_eq!(section.bytes, vec![number as u8; 1 << 20]);
            }
            other => panic!("{} came", other.name()),
        }
    }
    if !first {
        send(end);
    }
}

#[test]
fn a_good_pair_carries_megabytes_both_ways() {
    let (mut here, mut there) = good();
    std::thread::scope(|scope| {
        scope.spawn(|| exchange(&mut there, 24, false));
        exchange(&mut here, 24, true);
    });
    // The last words of an end that is dropped arrive.
    here.send(&Message::Bye).unwrap();
    drop(here);
    assert!(matches!(there.message("bye").unwrap(), Message::Bye));
    assert!(matches!(there.receive(), Err(WireError::Closed)));
    drop(there);
}

#[test]
fn what_one_end_said_before_it_was_dropped_arrives_though_the_other_end_sends() {
    let (mut here, mut there) = good();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Whatever comes meanwhile is in the way of nothing.
            std::thread::sleep(Duration::from_millis(50));
            there.send(&Message::refuse(vec!["no".to_owned()])).unwrap();
        });
        let section = Section {
            name: "s".to_owned(),
            version: 1,
            bytes: vec![0; 8 << 20],
        };
        let begun = Instant::now();
        let error = (0..100).find_map(|_| here.send_section(&section).err());
        assert!(matches!(error, Some(WireError::Closed)), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(10));
        match here.message("refusal").unwrap() {
            Message::Refuse { reasons } => assert_eq!(reasons, ["no"]),
            other => panic!("{}", other.name()),
        }
    });
}

#[test]
fn a_peer_that_does_not_read_is_noticed() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (here, there) = pair();
    let impatient = Limits {
        silence: Duration::from_secs(1),
        ..Limits::default()
    };
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| server.accept(there, limits()));
        let mut here = client.connect(here, impatient).unwrap();
        let there = accepted.join().unwrap().unwrap();
        let section = Section {
            name: "s".to_owned(),
            version: 1,
            bytes: vec![0; 32 << 20],
        };
        let begun = Instant::now();
        let error = (0..10).find_map(|_| here.send_section(&section).err());
        assert!(error.is_some());
        drop(here);
        assert!(begun.elapsed() < Duration::from_secs(60));
        drop(there);
    });
}

#[test]
fn keep_alive_frames_get_through() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (here, there) = pair();
    let quick = Limits {
        silence: Duration::from_secs(20),
        beat: Duration::from_millis(50),
    };
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| server.accept(there, limits()));
        let _here = client.connect(here, quick).unwrap();
        let mut there = accepted.join().unwrap().unwrap();
        assert!(
            there
                .receive_within(Duration::from_secs(1))
                .unwrap()
                .is_none()
        );
        assert!(there.received() > 0);
    });
}

#[test]
fn a_connection_that_is_cut_is_closed_at_both_ends() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (here, there) = pair();
    let knife = here.try_clone().unwrap();
    let (mut here, mut there) = std::thread::scope(|scope| {
        let accepted = scope.spawn(|| server.accept(there, limits()));
        let here = client.connect(here, limits()).unwrap();
        (here, accepted.join().unwrap().unwrap())
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            knife.shutdown(Shutdown::Both).unwrap();
        });
        let begun = Instant::now();
        assert!(matches!(there.receive(), Err(WireError::Closed)));
        assert!(matches!(here.receive(), Err(WireError::Closed)));
        drop((here, there));
        assert!(begun.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn bytes_that_were_changed_end_the_connection() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (here, there) = pair();
    let mut intruder = here.try_clone().unwrap();
    let (_here, mut there) = std::thread::scope(|scope| {
        let accepted = scope.spawn(|| server.accept(there, limits()));
        let here = client.connect(here, limits()).unwrap();
        (here, accepted.join().unwrap().unwrap())
    });
    intruder.write_all(&[0x17, 3, 3, 0, 32]).unwrap();
    intruder.write_all(&[7; 32]).unwrap();
    assert!(matches!(there.receive(), Err(WireError::Closed)));
}

#[test]
fn certificates_of_another_ca_are_refused_and_both_ends_say_so() {
    let (ours, theirs, same) = (Ca::new(), Ca::named("theirs"), Ca::new());
    let server = Server::load(&ours.plain("b.example")).unwrap();
    for (ca, says) in [(&theirs, "has not signed it"), (&same, "of the same name")] {
        let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
        let (here, there) = shake(&client, &server);
        expect(here, "was not signed by the CA");
        expect(there, says);
    }

    // A client that trusts the server, and is not trusted.
    let mut files = theirs.plain("a.example");
    let both = ours.path("both.pem");
    let mut all = std::fs::read(ours.path("ca.pem")).unwrap();
    all.extend(std::fs::read(theirs.path("ca.pem")).unwrap());
    std::fs::write(&both, all).unwrap();
    files.ca = both;
    let client = Client::load(&files, "b.example").unwrap();
    let (here, there) = shake(&client, &server);
    expect(here, "the other side refuses this side's certificate");
    expect(there, "was not signed by the CA");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let mut client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let provider = files::provider();
    let loaded = ca.plain("a.example").load(&provider).unwrap();
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(loaded.roots)
        .with_no_client_auth();
    client.config = Arc::new(config);
    let (here, there) = shake(&client, &server);
    expect(here, "refuses this side's certificate: there is none");
    expect(there, "has no certificate");
}

#[test]
fn expired_certificates_are_found_here_and_by_the_other_side() {
    let ca = Ca::new();
    let expired = ca.sign("old.example", |params| {
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    expect_load(
        Server::load(&expired),
        &["old.example.pem", "expired at 2020-01-01T00:00:00Z"],
    );
    let early = ca.sign("new.example", |params| {
        params.not_before = date_time_ymd(2999, 1, 1);
        params.not_after = date_time_ymd(3000, 1, 1);
    });
    expect_load(Server::load(&early), &["is not valid before 2999-01-01"]);
    let error = Client::load(&expired, "b.example").unwrap_err().to_string();
    assert!(error.contains("expired at 2020"), "{error}");

    // An end that does not look at its own.
    let provider = files::provider();
    let own = expired.load(&provider).unwrap().own;
    let mut server = Server::load(&ca.plain("b.example")).unwrap();
    let mut config = ServerConfig::clone(&server.config);
    config.cert_resolver = Arc::new(SingleCertAndKey::from(own));
    server.config = Arc::new(config);
    let client = Client::load(&ca.plain("a.example"), "old.example").unwrap();
    let (here, there) = shake(&client, &server);
    expect(here, "the other side's certificate expired at 2020");
    expect(there, "by its clock");
}

#[test]
fn names_are_compared() {
    let ca = Ca::new();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let mut files = ca.plain("a.example");
    let client = Client::load(&files, "c.example").unwrap();
    let (here, there) = shake(&client, &server);
    expect(here, "is not for c.example but for b.example");
    expect(there, "(--tls-name)");

    files.name = Some("b.example".to_owned());
    let client = Client::load(&files, "c.example").unwrap();
    let (here, there) = shake(&client, &server);
    here.unwrap();
    there.unwrap();

    // The source's name, if the destination wants one.
    let mut own = ca.plain("b.example");
    own.name = Some("z.example".to_owned());
    let server = Server::load(&own).unwrap();
    let (here, there) = shake(&client, &server);
    expect(here, "not for the name it wants");
    expect(there, "is not for z.example but for a.example");
    own.name = Some("a.example".to_owned());
    let (here, there) = shake(&client, &Server::load(&own).unwrap());
    here.unwrap();
    there.unwrap();
}

#[test]
fn addresses_are_names_too() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "127.0.0.1").unwrap();
    let server = Server::load(&ca.plain("127.0.0.1")).unwrap();
    let (here, there) = shake(&client, &server);
    here.unwrap();
    there.unwrap();
    let error = Client::load(&ca.plain("a.example"), "no name").unwrap_err();
    assert!(error.to_string().contains("--tls-name"), "{error}");
}

#[test]
fn certificates_for_something_else_are_not_taken() {
    let ca = Ca::new();
    let files = ca.sign("a.example", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    Client::load(&files, "b.example").unwrap();
    expect_load(Server::load(&files), &["a.example.pem", "serverAuth"]);
}

/// What the server says about somebody who says `bytes` and then nothing.
fn stranger(bytes: &[u8], close: bool) -> (String, Duration) {
    let ca = Ca::new();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (mut here, there) = pair();
    here.write_all(bytes).unwrap();
    if close {
        here.shutdown(Shutdown::Write).unwrap();
    }
    let limits = Limits {
        silence: Duration::from_secs(1),
        ..Limits::default()
    };
    let begun = Instant::now();
    let error = server.accept(there, limits).unwrap_err();
    (error.to_string(), begun.elapsed())
}

#[test]
fn strangers_are_named_and_do_not_stay() {
    // The beginning of a plain connection is that of a frame.
    let garbage: Vec<u8> = (0..100_000_u32).map(|n| ((n * 7919) >> 3) as u8).collect();
    let long = [&[0x16, 3, 1, 0x40, 0][..], &[1; 0x4000]].concat();
    for (bytes, close, says) in [
        (&b"TERN\x20\0\0\0"[..], false, "does not speak it"),
        (b"GET / HTTP/1.1\r\n\r\n", false, "does not speak it"),
        (&garbage, false, "does not speak it"),
        (&long, true, "TLS:"),
        (b"", true, "hung up"),
        (b"", false, "did not end within 1 s"),
        (b"\x16\x03\x01", false, "did not end within 1 s"),
    ] {
        let (error, time) = stranger(bytes, close);
        assert!(error.contains(says), "{error}");
        assert!(time < Duration::from_secs(10), "{time:?}");
    }
}

#[test]
fn a_stranger_that_drips_does_not_stay() {
    let ca = Ca::new();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (mut here, there) = pair();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A record that is announced, and comes a byte at a time.
            let _ = here.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]);
            while here.write_all(&[3]).is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let limits = Limits {
            silence: Duration::from_secs(1),
            ..Limits::default()
        };
        let begun = Instant::now();
        expect(server.accept(there, limits), "did not end within 1 s");
        assert!(begun.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn a_source_says_what_it_found_instead_of_a_destination() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let quick = Limits {
        silence: Duration::from_secs(1),
        ..Limits::default()
    };
    let (here, mut there) = pair();
    there.write_all(b"TERN\x20\0\0\0").unwrap();
    expect(client.connect(here, quick), "does not speak it");
    let (here, there) = pair();
    drop(there);
    expect(client.connect(here, quick), "hung up");
    let (here, _there) = pair();
    expect(client.connect(here, quick), "did not end within 1 s");
}

#[test]
fn older_versions_are_not_spoken() {
    // A ClientHello without supported_versions is one of TLS 1.2.
    let mut hello = vec![3, 3];
    hello.extend([5; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    // Extensions: signature_algorithms, supported_groups.
    let extensions = [0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 23];
    hello.extend([0, extensions.len() as u8]);
    hello.extend(extensions);
    let mut record = vec![0x16, 3, 1, 0, hello.len() as u8 + 4];
    record.extend([1, 0, 0, hello.len() as u8]);
    record.extend(hello);
    let (error, _) = stranger(&record, false);
    assert!(error.contains("does not speak version 1.3"), "{error}");
}

#[test]
fn files_that_are_no_good_are_named_with_what_is_wrong() {
    let ca = Ca::new();
    let good = ca.plain("b.example");
    let file = |name: &str, text: &str| {
        let path = ca.path(name);
        std::fs::write(&path, text).unwrap();
        private(&path);
        path
    };
    let with = |adjust: &dyn Fn(&mut Files)| {
        let mut files = good.clone();
        adjust(&mut files);
        Server::load(&files)
    };
    let nothing = ca.path("nothing");
    expect_load(with(&|f| f.cert = nothing.clone()), &["nothing", "no such"]);
    expect_load(with(&|f| f.ca = ca.path("")), &["Is a directory"]);
    let text = file("text", "no PEM at all\n");
    expect_load(with(&|f| f.cert = text.clone()), &["text", "BEGIN CERT"]);
    expect_load(with(&|f| f.key = text.clone()), &["text", "private key"]);
    expect_load(with(&|f| f.ca = text.clone()), &["text", "BEGIN CERT"]);
    let swapped = with(&|f| (f.cert, f.key) = (good.key.clone(), good.cert.clone()));
    expect_load(swapped, &["b.example.key", "but a private key"]);
    let not_a_key = file("cert", &std::fs::read_to_string(&good.cert).unwrap());
    expect_load(
        with(&|f| f.key = not_a_key.clone()),
        &["but a certificate", "PRIVATE KEY"],
    );
    let cut = file("cut", &std::fs::read_to_string(&good.cert).unwrap()[..100]);
    expect_load(with(&|f| f.cert = cut.clone()), &["cut", "END"]);
    let no_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let no_der = file("no-der", no_der);
    expect_load(with(&|f| f.cert = no_der.clone()), &["no-der", "damaged"]);
    expect_load(with(&|f| f.ca = no_der.clone()), &["no-der", "damaged"]);
    let no_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let no_key = file("no-key", no_key);
    expect_load(with(&|f| f.key = no_key.clone()), &["no-key", "ECDSA"]);
    let password = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n";
    let password = file("password", password);
    expect_load(
        with(&|f| f.key = password.clone()),
        &["password", "openssl pkey -in"],
    );
    let other = ca.plain("c.example").key;
    expect_load(
        with(&|f| f.key = other.clone()),
        &["c.example.key", "is not that of", "b.example.pem"],
    );
    let exposed = file("exposed", &std::fs::read_to_string(&good.key).unwrap());
    std::fs::set_permissions(&exposed, std::fs::Permissions::from_mode(0o644)).unwrap();
    expect_load(with(&|f| f.key = exposed.clone()), &["exposed", "chmod o="]);
    let stranger = Ca::new();
    expect_load(
        with(&|f| f.ca = stranger.path("ca.pem")),
        &["b.example.pem", "was not signed by the CA", "ca.pem"],
    );
    for (option, adjust) in [
        (
            "--tls-ca: ",
            (|f: &mut Files, path| f.ca = path) as fn(&mut Files, PathBuf),
        ),
        ("--tls-cert: ", |f, path| f.cert = path),
        ("--tls-key: ", |f, path| f.key = path),
    ] {
        let missing = with(&|f| adjust(f, nothing.clone()));
        expect_load(missing, &[option, "nothing: no such file"]);
    }
    let zero = PathBuf::from("/dev/zero");
    expect_load(with(&|f| f.ca = zero.clone()), &["/dev/zero", "longer"]);
}

#[test]
fn the_certificate_of_a_ca_is_none_of_a_host() {
    let ca = Ca::new();
    let files = ca.sign("b.example", |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    expect_load(
        Server::load(&files),
        &[
            "b.example.pem is that of a CA",
            "have the CA sign one for the host",
        ],
    );
    // What the library calls it is said to nobody.
    for name in [
        "CaUsedAsEndEntity",
        "EndEntityUsedAsCa",
        "PathLenConstraintViolated",
        "NameConstraintViolation",
        "UnsupportedCriticalExtension",
        "UnsupportedCertVersion",
        "EmptyEkuExtension",
    ] {
        let error = rustls::OtherError(Arc::new(io::Error::other(name)));
        let why = handshake::why(&rustls::CertificateError::Other(error));
        assert!(!why.contains(name) && why.contains(' '), "{why}");
    }
}

#[test]
fn what_a_stranger_calls_itself_is_shown_as_text() {
    let names = vec!["\x1b[31mred".to_owned(); 9];
    let error = handshake::why(&rustls::CertificateError::NotValidForNameContext {
        expected: ServerName::try_from("b.example").unwrap(),
        presented: names,
    });
    assert!(!error.contains('\x1b') && error.contains('…'), "{error}");
}

#[test]
fn an_end_that_is_dropped_does_not_wait_for_one_that_stays() {
    let ca = Ca::new();
    let client = Client::load(&ca.plain("a.example"), "b.example").unwrap();
    let server = Server::load(&ca.plain("b.example")).unwrap();
    let (here, there) = pair();
    // Something between the ends that passes on everything but the end.
    let (inside, outside) = pair();
    std::thread::scope(|scope| {
        for (mut from, mut to) in [
            (outside.try_clone().unwrap(), there.try_clone().unwrap()),
            (there.try_clone().unwrap(), outside.try_clone().unwrap()),
        ] {
            scope.spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    if to.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
            });
        }
        let accepted = scope.spawn(|| server.accept(here, limits()));
        let here = client.connect(inside, limits()).unwrap();
        let other = accepted.join().unwrap().unwrap();
        let begun = Instant::now();
        drop(here);
        assert!(begun.elapsed() < Duration::from_secs(5));
        drop(other);
        outside.shutdown(Shutdown::Both).unwrap();
        there.shutdown(Shutdown::Both).unwrap();
    });
}
