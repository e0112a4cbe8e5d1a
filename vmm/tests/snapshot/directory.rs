//! Directories on disk that are no snapshots, are damaged, or are somebody else's.

use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};
use std::{fs, io};

use devices::memory::GuestRam;
use migration::{Existing, Guest, GuestPages, PageSet, Writer};
use vmm::config::MachineSpec;
use vmm::layout;
use vmm::machine::pages::RamPages;
use vmm::snapshot::format::hex::HexBytes;
use vmm::snapshot::format::state::State;
use vmm::snapshot::format::write;
use vmm::snapshot::overrides::Overrides;
use vmm::snapshot::restore::Source;

use super::golden::{give_files, read};

/// A good snapshot on disk, with the files its machine needs.
pub struct Snapshot {
    pub directory: tempfile::TempDir,
    pub state: State,
}

impl Snapshot {
    /// That of golden document `name`.
    pub fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut state = read(name);
        give_files(&mut state.machine, directory.path());
        let mut snapshot = Self { directory, state };
        snapshot.save("saved");
        snapshot
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("saved")
    }

    fn save(&mut self, name: &str) {
        let ram = GuestRam::new(&layout::ram_ranges(self.state.machine.memory)).unwrap();
        let pages = RamPages::new(&ram).unwrap();
        let progress = &mut |_| ControlFlow::Continue(());
        let path = self.directory.path().join(name);
        let writer = Writer::create(&path, Existing::Refuse).unwrap();
        let mut memory = writer.memory(pages.layout(), None).unwrap();
        let all = PageSet::full(pages.layout());
        memory.pass(&pages, &all, Guest::Paused, progress).unwrap();
        self.state.id = HexBytes(memory.id().0.to_vec());
        let memory = memory.finish(progress).unwrap();
        self.state.memory.digest = HexBytes(memory.digest().0.to_vec());
        writer.commit(&write(&self.state).unwrap(), memory).unwrap();
    }

    pub fn open(&self, overrides: &Overrides) -> Result<MachineSpec, String> {
        open(&self.path(), overrides)
    }
}

/// What opening says, with its sources.
pub fn open(path: &Path, overrides: &Overrides) -> Result<MachineSpec, String> {
    match Source::open(path, overrides) {
        Ok(source) => Ok(source.spec().clone()),
        Err(error) => Err(vmm::errors::chain(&error)),
    }
}

fn refusal(snapshot: &Snapshot) -> String {
    let error = snapshot.open(&Overrides::default()).unwrap_err();
    println!("{error}");
    error
}

fn fifo(path: &Path) {
    rustix::fs::mkfifoat(rustix::fs::CWD, path, 0o600.into()).unwrap();
}

/// A good one, and the same one by way of a symbolic link to the directory.
#[test]
fn a_good_snapshot_is_opened() {
    let snapshot = Snapshot::new("devices.json");
    let spec = snapshot.open(&Overrides::default()).unwrap();
    assert_eq!(spec, snapshot.state.machine.to_spec().unwrap());
    let link = snapshot.directory.path().join("link");
    std::os::unix::fs::symlink("saved", &link).unwrap();
    assert!(open(&link, &Overrides::default()).is_ok());
}

/// Nothing in a directory keeps whoever opens it waiting.
#[test]
fn files_that_are_none_are_refused_by_name() {
    for name in ["state.json", "memory.bin"] {
        let snapshot = Snapshot::new("devices.json");
        let file = snapshot.path().join(name);
        let elsewhere = snapshot.directory.path().join("elsewhere");
        fs::rename(&file, &elsewhere).unwrap();
        let kinds: [(&str, &dyn Fn()); 4] = [
            ("does not exist", &|| ()),
            ("directory", &|| fs::create_dir(&file).unwrap()),
            ("FIFO", &|| fifo(&file)),
            ("symbolic link", &|| {
                std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
            }),
        ];
        for (kind, make) in kinds {
            make();
            let error = refusal(&snapshot);
            assert!(error.contains(kind) && error.contains(name), "{error}");
            if kind == "directory" {
                fs::remove_dir(&file).unwrap();
            } else if kind != "does not exist" {
                fs::remove_file(&file).unwrap();
            }
        }
        fs::rename(&elsewhere, &file).unwrap();
        assert!(snapshot.open(&Overrides::default()).is_ok());
    }
}

#[test]
fn directories_that_are_none_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "").unwrap();
    fifo(&at("fifo"));
    fs::create_dir(at("empty")).unwrap();
    for (name, part) in [
        ("missing", "does not exist"),
        ("file", "is not a directory"),
        ("fifo", "is not a directory"),
        ("empty", "does not exist"),
        ("file/below", "is not a directory"),
        ("", "state.json"),
    ] {
        let error = open(&at(name), &Overrides::default()).unwrap_err();
        assert!(error.contains(part), "{name}: {error}");
    }
}

#[test]
fn memory_of_another_length_or_snapshot_is_refused() {
    let mut snapshot = Snapshot::new("devices.json");
    let memory = snapshot.path().join("memory.bin");
    let len = fs::metadata(&memory).unwrap().len();
    for wrong in [0, 1, 4095, 4096, len - 4096, len - 1, len + 1, len + 4096] {
        let file = fs::File::options().write(true).open(&memory).unwrap();
        let whole = fs::read(&memory).unwrap();
        file.set_len(wrong).unwrap();
        let error = refusal(&snapshot);
        assert!(error.contains("memory.bin"), "{wrong}: {error}");
        fs::write(&memory, whole).unwrap();
    }
    assert!(snapshot.open(&Overrides::default()).is_ok());

    let good = snapshot.state.clone();
    snapshot.save("other");
    fs::copy(snapshot.directory.path().join("other/memory.bin"), &memory).unwrap();
    let error = refusal(&snapshot);
    assert!(error.contains("is that of snapshot"), "{error}");
    // With its id, it still has another digest.
    let mut lying = snapshot.state.clone();
    lying.memory.digest = HexBytes(vec![0; 32]);
    let state = snapshot.path().join("state.json");
    fs::write(&state, write(&lying).unwrap()).unwrap();
    let error = refusal(&snapshot);
    assert!(error.contains("digest"), "{error}");
    lying.machine.memory = 128 << 20;
    fs::write(&state, write(&lying).unwrap()).unwrap();
    let error = refusal(&snapshot);
    assert!(error.contains("RAM"), "{error}");
    assert_ne!(good.id, lying.id);
}

#[test]
fn a_state_that_is_too_long_is_not_read() {
    let snapshot = Snapshot::new("devices.json");
    let state = snapshot.path().join("state.json");
    let file = fs::File::options().append(true).open(&state).unwrap();
    file.set_len((160 << 20) + 1).unwrap();
    let error = refusal(&snapshot);
    assert!(
        error.contains("more than 167772160 are not read"),
        "{error}"
    );
    // A hole reads as zeroes, which are no JSON.
    file.set_len(160 << 20).unwrap();
    let error = refusal(&snapshot);
    assert!(error.contains("state.json: "), "{error}");
    // Space is.
    let text = write(&snapshot.state).unwrap();
    let mut padded = text.clone();
    padded.resize(160 << 20, b' ');
    fs::write(&state, &padded).unwrap();
    assert!(snapshot.open(&Overrides::default()).is_ok());
    padded.push(b' ');
    fs::write(&state, padded).unwrap();
    let error = refusal(&snapshot);
    assert!(
        error.contains("more than 167772160 are not read"),
        "{error}"
    );
}

/// Paths are followed that were named here, and no others.
#[test]
fn paths_of_somebody_elses_snapshot_are_not_followed() {
    let snapshot = Snapshot::new("owner.json");
    let dir = snapshot.directory.path();
    let others = Overrides {
        disks: ["pf0=pf.raw", "pf0-vf%d=vf%d.raw"]
            .map(|text| {
                let (name, file) = text.split_once('=').unwrap();
                format!("{name}={}", dir.join(file).display())
            })
            .iter()
            .map(|text| text.parse().unwrap())
            .collect(),
        ..Overrides::default()
    };
    let part = Overrides {
        disks: others.disks[..1].to_vec(),
        ..Overrides::default()
    };
    for (name, mode) in [
        ("", 0o777),
        ("", 0o720),
        ("state.json", 0o622),
        ("memory.bin", 0o660),
    ] {
        let path = snapshot.path().join(name);
        let before = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let error = refusal(&snapshot);
        assert!(
            error.contains("pf0, pf0-vf1, pf0-vf2, pf0-vf3, pf0-vf4 with"),
            "{error}"
        );
        let error = snapshot.open(&part).unwrap_err();
        assert!(error.contains("files of pf0-vf1, pf0-vf2"), "{error}");
        assert!(snapshot.open(&others).is_ok());
        fs::set_permissions(&path, before).unwrap();
        assert!(snapshot.open(&Overrides::default()).is_ok());
    }
}

#[test]
fn files_that_changed_are_refused_unless_they_are_named() -> io::Result<()> {
    let mut snapshot = Snapshot::new("devices.json");
    let path = snapshot.state.machine.disks[0].file.path.clone();
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let file = fs::File::options().write(true).open(&path)?;
    file.set_modified(time)?;
    let spec = snapshot.state.machine.to_spec().unwrap();
    snapshot.state.machine = vmm::snapshot::format::machine::Machine::of(&spec);
    let state = snapshot.path().join("state.json");
    fs::write(&state, write(&snapshot.state).unwrap())?;
    let unfit = |overrides: &Overrides| {
        let opened = Source::open(&snapshot.path(), overrides).unwrap();
        opened.unfit().map(str::to_owned)
    };
    assert_eq!(unfit(&Overrides::default()), None);

    file.set_modified(time + Duration::from_nanos(1))?;
    let error = unfit(&Overrides::default()).unwrap();
    assert!(error.contains("disk0: ") && error.contains("was written to since"));
    let named = Overrides {
        disks: vec![format!("disk0={}", path.display()).parse().unwrap()],
        ..Overrides::default()
    };
    assert_eq!(unfit(&named), None);
    file.set_len(512)?;
    let error = unfit(&Overrides::default()).unwrap();
    assert!(error.contains("has 512 bytes and had 65536"), "{error}");
    // An option for another disk does not help.
    let copy = snapshot.path().with_file_name("copy.raw");
    fs::copy(&snapshot.state.machine.disks[1].file.path, &copy)?;
    let other = Overrides {
        disks: vec![format!("disk1={}", copy.display()).parse().unwrap()],
        ..Overrides::default()
    };
    assert!(unfit(&other).is_some());
    Ok(())
}
