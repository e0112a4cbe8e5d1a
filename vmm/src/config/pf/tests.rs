use proptest::prelude::*;

use super::*;
use crate::config::Config;

/// Whatever is left out is the default, and writing it again gives the same text.
#[test]
fn owners_are_written_and_read() {
    for text in [
        "net,vfs=1",
        "net,vfs=255,passthrough",
        "net,vfs=4,switch=lan,uplink-tap=tap0,mac=02:00:5e:10:00:00,strict-admin,admin=v1.4",
        "block,vfs=2,path=pf.raw,vf-path=vf%d.raw",
        "block,vfs=2,path=a,vf-path=/x/%d,readonly,strict-admin",
        "block,vfs=8,vf-path=vf%d.raw,passthrough",
        "block,vfs=8,vf-path=vf%d.raw,drain-ms=0,passthrough,suspend=v5",
        "net,vfs=1,admin=v1.4,drain-ms=5000",
    ] {
        let pf: Pf = text.parse().unwrap();
        assert_eq!(pf.to_string(), text);
        let json = serde_json::to_string(&pf).unwrap();
        assert_eq!(serde_json::from_str::<Pf>(&json).unwrap(), pf, "{json}");
    }
}

#[test]
fn the_file_says_the_same_as_the_command_line() {
    for (json, text) in [
        (r#"{"type": "net", "vfs": 3}"#, "net,vfs=3"),
        (
            r#"{"type": "net", "vfs": 3, "uplink_tap": "t0", "strict_admin": true, "admin": "draft"}"#,
            "net,vfs=3,uplink-tap=t0,strict-admin,admin=draft",
        ),
        (
            r#"{"type": "net", "vfs": 1, "drain_ms": 20}"#,
            "net,vfs=1,drain-ms=20",
        ),
        (
            r#"{"type": "block", "vfs": 1, "path": "p", "vf_path": "v%d", "readonly": true}"#,
            "block,vfs=1,path=p,vf-path=v%d,readonly",
        ),
    ] {
        let pf: Pf = serde_json::from_str(json).unwrap();
        assert_eq!(pf, text.parse().unwrap());
    }
}

#[test]
fn owners_that_make_no_sense_are_refused_with_the_part() {
    for (text, part) in [
        ("", "not understood"),
        ("rng,vfs=1", "rng"),
        ("net", "vfs=N"),
        ("net,", "vfs=N"),
        ("net,vfs=", "vfs="),
        ("net,vfs=0", "between 1 and 255"),
        ("net,vfs=256", "vfs=256"),
        ("net,vfs=1,vfs=2", "given twice"),
        ("net,vfs=-1", "vfs=-1"),
        ("net,vfs=1,passthrough=yes", "passthrough=yes"),
        ("net,vfs=1,switch=", "switch="),
        ("net,vfs=1,uplink-tap=a/b", "uplink-tap=a/b"),
        ("net,vfs=1,mac=53:00:00:00:00:00", "mac=53:00:00:00:00:00"),
        ("net,vfs=1,admin=v9", "admin=v9"),
        ("net,vfs=1,drain-ms=5001", "0 to 5000"),
        ("net,vfs=1,drain-ms=-1", "drain-ms=-1"),
        ("net,vfs=1,readonly", "net and readonly"),
        ("net,vfs=1,path=a", "net and path=a"),
        ("net,vfs=1,vf-path=a%d", "net and vf-path=a%d"),
        ("block,vfs=1,path=a", "vf-path="),
        ("block,vfs=1,vf-path=%d", "path=PATH"),
        ("block,vfs=1,path=,vf-path=%d", "path= is empty"),
        ("block,vfs=1,path=a,vf-path=vf.raw", "vf-path=vf.raw"),
        ("block,vfs=1,path=a,vf-path=%d%d", "once"),
        (
            "block,vfs=1,path=a,vf-path=%d,switch=s",
            "block and switch=s",
        ),
        (
            "block,vfs=1,path=a,vf-path=%d,mac=02:00:00:00:00:01",
            "mac=02:00:00:00:00:01",
        ),
        (
            "block,vfs=1,path=a,vf-path=%d,passthrough",
            "path=a and passthrough",
        ),
    ] {
        let message = text.parse::<Pf>().unwrap_err();
        assert!(message.contains(part), "{text}: {message}");
    }
}

#[test]
fn every_member_has_a_file_of_its_own() {
    let pf: Pf = "block,vfs=3,path=pf.raw,vf-path=d/vf-%d.raw"
        .parse()
        .unwrap();
    let paths: Vec<_> = pf
        .paths()
        .into_iter()
        .map(|(n, p)| (n, p.display().to_string()))
        .collect();
    let expected = [
        (0, "pf.raw"),
        (1, "d/vf-1.raw"),
        (2, "d/vf-2.raw"),
        (3, "d/vf-3.raw"),
    ];
    assert_eq!(paths, expected.map(|(n, p)| (n, p.to_owned())));
}

#[test]
fn given_addresses_count_in_their_last_three_octets() {
    let macs = |text: &str| {
        let pf: Pf = text.parse().unwrap();
        pf.given_macs()
            .iter()
            .map(MacAddress::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        macs("net,vfs=2,mac=02:00:5e:00:00:ff"),
        [
            "02:00:5e:00:00:ff",
            "02:00:5e:00:01:00",
            "02:00:5e:00:01:01"
        ]
    );
    assert_eq!(
        macs("net,vfs=1,mac=02:00:5e:ff:ff:ff,passthrough"),
        ["02:00:5e:00:00:00"]
    );
    assert_eq!(macs("net,vfs=1"), [""; 0]);
}

fn resolve(
    disks: &[&str],
    nets: &[&str],
    pfs: &[&str],
) -> Result<super::super::MachineSpec, String> {
    let config = Config {
        kernel: Some("vmlinuz".into()),
        disks: disks.iter().map(|t| t.parse().unwrap()).collect(),
        nets: nets.iter().map(|t| t.parse().unwrap()).collect(),
        pfs: pfs.iter().map(|t| t.parse().unwrap()).collect(),
        ..Default::default()
    };
    config.resolve().map_err(|e| e.to_string())
}

/// Disks, interfaces, owners, and what the message names.
type Conflict<'a> = (&'a [&'a str], &'a [&'a str], &'a [&'a str], [&'a str; 2]);

#[test]
fn contradictions_between_options_name_both() {
    const DISKS: &str = "block,vfs=2,path=a,vf-path=vf%d";
    let cases: [Conflict<'_>; 7] = [
        (&["path=a"], &[], &[DISKS], ["--disk path=a", "--pf block"]),
        (
            &["path=vf2"],
            &[],
            &[DISKS],
            ["--disk path=vf2", "(virtual function 2)"],
        ),
        (
            &[],
            &[],
            &["block,vfs=1,path=vf1,vf-path=vf%d"],
            ["path=vf1", "(virtual function 1)"],
        ),
        (
            &[],
            &["tap=t"],
            &["net,vfs=1,uplink-tap=t"],
            ["--net tap=t", "--pf net"],
        ),
        (
            &[],
            &[],
            &["net,vfs=1,uplink-tap=t", "net,vfs=2,uplink-tap=t"],
            ["vfs=1,uplink-tap=t", "vfs=2,uplink-tap=t"],
        ),
        (
            &[],
            &["switch=s,mac=02:00:00:00:00:02"],
            &["net,vfs=2,mac=02:00:00:00:00:00"],
            ["--net switch=s", "--pf net,vfs=2"],
        ),
        (
            &[],
            &[],
            &[
                "net,vfs=2,mac=02:00:00:00:00:00",
                "net,vfs=3,mac=02:00:00:00:00:02",
            ],
            ["--pf net,vfs=2", "--pf net,vfs=3"],
        ),
    ];
    for (disks, nets, pfs, parts) in cases {
        let message = resolve(disks, nets, pfs).unwrap_err();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn files_nobody_writes_may_be_shared() {
    let owner = "block,vfs=1,path=vf1,vf-path=vf%d,readonly";
    assert!(resolve(&["path=vf1,readonly"], &[], &[owner]).is_ok());
    assert!(resolve(&["path=vf1"], &[], &[owner]).is_err());
}

#[test]
fn every_owner_has_a_bus() {
    for (pfs, buses) in [
        (&["net,vfs=1"][..], 2),
        (&["net,vfs=255"], 2),
        (&["net,vfs=255,passthrough", "net,vfs=1"], 3),
    ] {
        let machine = resolve(&[], &[], pfs).unwrap();
        assert_eq!(machine.bus_count(), buses, "{pfs:?}");
    }
    assert!(resolve(&[], &[], &["net,vfs=255"; 30]).is_ok());
    let message = resolve(&[], &[], &["net,vfs=255"; 31]).unwrap_err();
    assert!(message.contains("32 devices are too many"), "{message}");
}

proptest! {
    #[test]
    fn no_text_panics(text in "(net|block|\\PC{0,4})(,(vfs=[0-9]{1,4}|vf-path=[a%d]{0,4}|\\PC{0,8})){0,4}") {
        let _ = text.parse::<Pf>();
    }
}
