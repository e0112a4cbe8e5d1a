use proptest::prelude::*;

use super::*;
use crate::machine::hardware::fresh_ram;

fn with_kernel() -> Config {
    Config {
        kernel: Some("vmlinuz".into()),
        ..Default::default()
    }
}

fn refused(config: Config) -> String {
    config.resolve().unwrap_err().to_string()
}

#[test]
fn defaults_are_filled_in() {
    let machine = with_kernel().resolve().unwrap();
    assert_eq!(
        (machine.cpus, machine.memory, machine.rng, machine.console),
        (1, DEFAULT_MEMORY, true, Target::Stdio)
    );
    assert_eq!(machine.boot.cmdline, DEFAULT_CMDLINE);
}

#[test]
fn the_command_line_wins_and_lists_grow() {
    let file: Config = serde_json::from_str(
        r#"{"kernel": "/a", "cpus": 2, "memory": "1G", "rng": false, "console": "none",
            "disks": [{"path": "/d1", "readonly": true}], "nets": [{"switch": "s"}]}"#,
    )
    .unwrap();
    let over = Config {
        kernel: Some("/b".into()),
        cpus: Some(4),
        rng: Some(true),
        disks: vec!["path=/d2".parse().unwrap()],
        ..Default::default()
    };
    let machine = file.overlaid(over).resolve().unwrap();
    assert_eq!(machine.boot.kernel, PathBuf::from("/b"));
    assert_eq!((machine.cpus, machine.memory), (4, layout::GIB));
    assert!(machine.rng);
    assert_eq!(machine.console, Target::None);
    let paths: Vec<_> = machine.disks.iter().map(|d| d.path.clone()).collect();
    assert_eq!(paths, [PathBuf::from("/d1"), PathBuf::from("/d2")]);
}

#[test]
fn what_is_left_open_is_decided_the_same_each_time() {
    let decided = || {
        let config = Config {
            kernel: Some("k".into()),
            disks: vec!["path=d".parse().unwrap()],
            nets: vec!["switch=a".parse().unwrap(), "switch=a".parse().unwrap()],
            pfs: vec![
                "net,vfs=2".parse().unwrap(),
                "block,vfs=2,path=p,vf-path=v%d".parse().unwrap(),
            ],
            console: Some("file=c".parse().unwrap()),
            ..Config::default()
        };
        config.resolve().unwrap()
    };
    let spec = decided();
    assert_eq!(spec, decided());
    let macs: Vec<_> = spec.nets.iter().map(|net| net.mac.unwrap()).collect();
    assert_ne!(macs[0], macs[1]);
    let paths = [&spec.boot.kernel, &spec.disks[0].path];
    assert!(paths.iter().all(|path| path.is_absolute()));
    assert!(matches!(&spec.console, Target::File(path) if path.is_absolute()));
    let members = spec.pfs[1].paths();
    assert!(members.iter().all(|(_, path)| path.is_absolute()));
    assert!(matches!(
        spec.pfs[0].device,
        PfDevice::Net { mac: Some(_), .. }
    ));
}

#[test]
fn files_with_unknown_or_wrong_keys_are_refused() {
    for text in [
        r#"{"kernal": "a"}"#,
        r#"{"cpus": "two"}"#,
        r#"{"cpus": -1}"#,
        r#"{"disks": [{"path": "a", "readonyl": true}]}"#,
        r#"{"disks": [{}]}"#,
        r#"{"nets": [{"tap": "a", "switch": "b"}]}"#,
        r#"{"nets": [{"mac": "52:54:00:00:00:01"}]}"#,
        r#"{"console": "tty"}"#,
        "",
    ] {
        assert!(serde_json::from_str::<Config>(text).is_err(), "{text}");
    }
}

#[test]
fn numbers_out_of_range_are_refused_with_the_range() {
    assert!(refused(Config::default()).contains("--kernel"));
    for cpus in [0, 255, u32::MAX] {
        let config = Config {
            cpus: Some(cpus),
            ..with_kernel()
        };
        assert!(refused(config).contains("between 1 and 254"));
    }
    for memory in ["1M", "1T", "lots", ""] {
        let config = Config {
            memory: Some(memory.to_owned()),
            ..with_kernel()
        };
        let message = refused(config);
        assert!(message.starts_with("--memory"), "{message}");
        assert!(message.contains("between 64M and 256G"), "{message}");
    }
}

#[test]
fn memory_is_kept_in_what_was_asked_for() {
    let file: Config = serde_json::from_str(r#"{"memory_backing": "memfd"}"#).unwrap();
    assert_eq!(file.memory_backing, Some(MemoryBacking::Memfd));
    let over = Config {
        memory_backing: Some(MemoryBacking::Anonymous),
        ..Config::default()
    };
    assert_eq!(
        file.clone().overlaid(over).memory_backing,
        Some(MemoryBacking::Anonymous)
    );
    let same = file.overlaid(Config::default());
    assert_eq!(same.memory_backing, Some(MemoryBacking::Memfd));
    let ram = |backing| fresh_ram(64 * layout::MIB, backing).unwrap();
    assert!(ram(MemoryBacking::Memfd).memfd().is_some());
    assert!(ram(MemoryBacking::Anonymous).memfd().is_none());
    let movable = Config {
        api_socket: Some("a.sock".into()),
        ..Config::default()
    };
    assert_eq!(movable.memory_backing(), MemoryBacking::Memfd);
    assert_eq!(Config::default().memory_backing(), MemoryBacking::Anonymous);
}

#[test]
fn wrong_values_in_a_file_are_refused_with_file_and_field() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.json");
    for (text, parts) in [
        (r#"{"memory": "1T"}"#, ["\"memory\"", "'1T'"]),
        (r#"{"memory": "1G", "cpus": 300}"#, ["\"cpus\"", "300"]),
        (
            r#"{"disks": [{"path": "a"}, {"path": "b", "queues": 0}]}"#,
            ["\"disks[1]\"", "queues=0"],
        ),
        (r#"{"disks": [{"path": ""}]}"#, ["\"disks[0]\"", "path="]),
        (r#"["vmlinuz"]"#, ["expected an object", "line 1"]),
    ] {
        std::fs::write(&path, text).unwrap();
        let message = Config::from_file(&path).unwrap_err().to_string();
        assert!(message.contains("guest.json: "), "{message}");
        assert!(parts.iter().all(|p| message.contains(p)), "{message}");
    }
}

#[test]
fn contradictions_name_both_sides() {
    let disks = |texts: &[&str]| Config {
        disks: texts.iter().map(|t| t.parse().unwrap()).collect(),
        ..with_kernel()
    };
    let nets = |texts: &[&str]| Config {
        nets: texts.iter().map(|t| t.parse().unwrap()).collect(),
        ..with_kernel()
    };
    let cases = [
        (
            Config {
                virtio_console: Some(Target::Stdio),
                ..with_kernel()
            },
            ["--console stdio", "--virtio-console stdio"],
        ),
        (
            disks(&["path=a", "path=a,readonly"]),
            ["--disk path=a ", "--disk path=a,readonly"],
        ),
        (
            nets(&["tap=t0", "tap=t0,bus=port"]),
            ["--net tap=t0 ", "--net tap=t0,bus=port"],
        ),
        (
            nets(&[
                "switch=a,mac=52:54:00:00:00:01",
                "switch=b,mac=52:54:00:00:00:01",
            ]),
            ["--net switch=a", "--net switch=b"],
        ),
    ];
    for (config, sides) in cases {
        let message = refused(config);
        assert!(sides.iter().all(|s| message.contains(s)), "{message}");
    }
    disks(&["path=a,readonly", "path=a,readonly"])
        .resolve()
        .unwrap();
    nets(&["switch=a", "switch=a"]).resolve().unwrap();
}

#[test]
fn disks_are_parsed_and_printed() {
    for text in [
        "path=a",
        "path=a,readonly",
        "path=/a b/c=d,readonly,serial=XYZ,queues=4,bus=port",
    ] {
        let disk: Disk = text.parse().unwrap();
        assert_eq!(disk.to_string(), text);
        let json = serde_json::to_string(&disk).unwrap();
        assert_eq!(serde_json::from_str::<Disk>(&json).unwrap(), disk);
    }
}

#[test]
fn malformed_disks_are_refused_with_the_part() {
    for (text, part) in [
        ("", "not understood"),
        ("a", "'a'"),
        ("path=", "path="),
        ("readonly", "path="),
        ("path=a,readonly=yes", "'readonly=yes'"),
        ("path=a,path=b", "path is given twice"),
        ("path=a,queues=0", "queues=0"),
        ("path=a,queues=65", "queues=65"),
        ("path=a,queues=x", "queues=x"),
        ("path=a,serial=123456789012345678901", "serial="),
        ("path=a,bus=isa", "bus=isa"),
    ] {
        let message = text.parse::<Disk>().unwrap_err();
        assert!(message.contains(part), "{text}: {message}");
    }
}

#[test]
fn interfaces_are_parsed_and_printed() {
    for text in [
        "tap=tap0",
        "switch=lan",
        "switch=lan,mac=52:54:00:ab:cd:ef,bus=port",
    ] {
        let net: Net = text.parse().unwrap();
        assert_eq!(net.to_string(), text);
        let json = serde_json::to_string(&net).unwrap();
        assert_eq!(serde_json::from_str::<Net>(&json).unwrap(), net);
    }
}

#[test]
fn malformed_interfaces_are_refused_with_the_part() {
    for (text, part) in [
        ("", "not understood"),
        ("mac=52:54:00:00:00:01", "neither tap=NAME nor switch=NAME"),
        ("tap=a,switch=b", "tap=a and switch=b"),
        ("tap=", "tap="),
        ("tap=a/b", "tap=a/b"),
        ("tap=sixteen-bytes-xx", "tap="),
        ("switch=", "switch="),
        ("switch=a,mac=1", "mac=1"),
        ("switch=a,mac=52:54:00:00:00:0g", "mac="),
        ("switch=a,mac=52:54:00:00:00:+1", "mac="),
        ("switch=a,mac=53:54:00:00:00:01", "mac=53:54:00:00:00:01"),
        ("switch=a,mac=00:00:00:00:00:00", "mac=00:00:00:00:00:00"),
        ("switch=a,mac=52:54:00:00:00:01:02", "mac="),
    ] {
        let message = text.parse::<Net>().unwrap_err();
        assert!(message.contains(part), "{text}: {message}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,40}") {
        let _ = text.parse::<Disk>();
        let _ = text.parse::<Net>();
        let _ = serde_json::from_str::<Config>(&text);
    }
}

#[test]
fn the_examples_are_configurations() {
    for (text, devices, buses) in [
        (include_str!("../../../resources/examples/guest.json"), 5, 2),
        (include_str!("../../../resources/examples/sriov.json"), 5, 4),
    ] {
        let config: Config = serde_json::from_str(text).unwrap();
        let machine = config.resolve().unwrap();
        assert_eq!(
            (machine.device_count(), machine.bus_count()),
            (devices, buses)
        );
    }
}

#[test]
fn what_cannot_be_a_configuration_file_is_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("long");
    let file = std::fs::File::create(&long).unwrap();
    file.set_len(MAX_FILE + 1).unwrap();
    for (path, part) in [
        (long.as_path(), "longer than 1024 KiB"),
        (dir.path(), "not a regular file"),
        (Path::new("/dev/zero"), "not a regular file"),
    ] {
        let message = Config::from_file(path).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}
