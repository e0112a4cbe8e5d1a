//! An SR-IOV owner and its members, by the stock driver and by one in user space.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tempfile::TempDir;

use crate::block::{MIB, checksum};
use crate::net::with_tap;
use crate::trial;
use crate::vm::{Outcome, Vm};

/// MiB of each disk.
const DISK: u64 = 8;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("sriov::four_vfs_ping_and_move_100_mib", || {
            net(100, |vm| vm)
        }),
        trial("sriov::four_vfs_with_pci_realloc", || {
            net(4, |vm| vm.parameters("pci=realloc"))
        }),
        trial("sriov::four_vfs_with_linux_6_1", || {
            net(4, |vm| vm.kernel("vmlinuz-6.1", "6.1"))
        }),
        trial("sriov::vfs_come_and_go_100_times", rounds),
        trial("sriov::64_vfs_have_drivers_and_255_answer", many),
        trial("sriov::each_vf_has_a_disk_of_its_own", disks),
        trial(
            "sriov::flr_of_a_network_card_next_to_working_siblings",
            || {
                let outcome = vm("flr-io:n=4:rounds=3,dmesg-clean")
                    .args(["--pf", "net,vfs=4"])
                    .run_ok()?;
                ensure!(outcome.number("flr-io", "sibling_mib")? > 0);
                Ok(())
            },
        ),
        trial(
            "sriov::flr_of_a_disk_next_to_working_siblings",
            flr_of_disks,
        ),
        trial(
            "sriov::flr_of_an_owner_takes_its_members_along",
            flr_of_owner,
        ),
        trial("sriov::flr_of_a_card_that_was_passed_through", || {
            let outcome = vm("flr-io:pf=none:rounds=2,dmesg-clean")
                .args(["--pf", "net,vfs=3,passthrough"])
                .run_ok()?;
            ensure!(outcome.number("flr-io", "sibling_mib")? > 0);
            Ok(())
        }),
        trial(
            "sriov::flr_of_a_disk_that_was_passed_through",
            flr_of_passed_disk,
        ),
        trial("sriov::a_user_space_owner_driver", || {
            admin("net,vfs=4", "no", vm)
        }),
        trial("sriov::a_user_space_owner_driver_of_a_strict_owner", || {
            admin("net,vfs=4,strict-admin", "yes", vm)
        }),
        trial("sriov::a_user_space_owner_driver_with_linux_6_1", || {
            admin("net,vfs=4", "no", |scenario| {
                vm(scenario).kernel("vmlinuz-6.1", "6.1")
            })
        }),
        trial(
            "sriov::the_probe_of_linux_fails_quietly_on_a_strict_owner",
            strict,
        ),
        trial("sriov::two_owners_do_not_disturb_each_other", two_owners),
        trial("sriov::a_vf_reaches_the_machine_network", uplink),
        trial(
            "sriov::an_owner_shares_a_switch_with_plain_interfaces",
            shared,
        ),
        trial(
            "sriov::vfs_without_their_owner_are_plain_endpoints",
            passthrough,
        ),
        trial(
            "sriov::disks_without_their_owner_are_plain_endpoints",
            passthrough_disks,
        ),
    ]
}

fn vm(scenario: &str) -> Vm {
    Vm::new(scenario).args(["--cpus", "2"])
}

/// Enables four network cards, as `echo 4 > sriov_numvfs` does, has them talk, and disables them.
fn net(mib: u64, adjust: impl FnOnce(Vm) -> Vm) -> Result<()> {
    let scenario = format!("sriov-enable:n=4,sriov-ping:n=4:mib={mib},sriov-disable,dmesg-clean");
    let outcome = adjust(vm(&scenario).args(["--pf", "net,vfs=4"])).run_ok()?;
    let number = |scenario, key| outcome.number(scenario, key);
    ensure!(number("sriov-enable", "total")? == 4);
    ensure!(number("sriov-enable", "bound")? == 4);
    ensure!(number("sriov-ping", "pairs")? == 10, "PF and VFs are five");
    ensure!(number("sriov-ping", "bytes")? == 2 * mib * MIB);
    ensure!(number("sriov-disable", "removed")? == 4);
    Ok(())
}

fn rounds() -> Result<()> {
    // Linux sleeps for more than a second in each.
    let outcome = vm("sriov-rounds:n=4:rounds=100,sriov-ping:n=2:mib=1,dmesg-clean")
        .patience(Duration::from_secs(900))
        .args(["--pf", "net,vfs=4"])
        .run_ok()?;
    ensure!(outcome.number("sriov-rounds", "rounds")? == 100);
    Ok(())
}

fn many() -> Result<()> {
    vm("sriov-enable:n=64,sriov-disable,sriov-enable:n=255:drivers=no,sriov-disable,dmesg-clean")
        .args(["--memory", "512M", "--pf", "net,vfs=255"])
        .run_ok()
        .and_then(|outcome| {
            let seen = |text: &str| {
                ensure!(outcome.stdout.contains(text), "{}", outcome.stdout);
                Ok(())
            };
            seen("total=255 vfs=64 bound=64")?;
            seen("removed=64")?;
            seen("total=255 vfs=255 bound=0")?;
            seen("removed=255")
        })
}

/// Disks of an owner (number 0) and `vfs` members, each with contents of its own, and the option that names them.
struct Disks {
    _directory: TempDir,
    files: Vec<PathBuf>,
    option: String,
}

impl Disks {
    fn new(vfs: usize) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(format!("disk-{name}.raw"));
        let files: Vec<_> = (0..=vfs).map(|number| path(&number.to_string())).collect();
        for (number, file) in files.iter().enumerate() {
            let mut file = File::create(file)?;
            file.write_all(format!("disk number {number}").as_bytes())?;
            file.set_len(DISK * MIB)?;
        }
        let (pf, vf) = (path("0"), path("%d"));
        Ok(Self {
            files,
            option: format!(
                "block,vfs={vfs},path={},vf-path={}",
                pf.display(),
                vf.display()
            ),
            _directory: directory,
        })
    }

    /// The option with which the monitor keeps the owner, which then has no disk.
    fn passthrough(&self) -> String {
        let owner = format!("path={},vf-path", self.files[0].display());
        format!("{},passthrough", self.option.replace(&owner, "vf-path"))
    }

    /// The checksums of the first `mib` MiB of the members' files, as the guest reports them.
    fn checksums(&self, mib: u64) -> Result<String> {
        let one = |file: &PathBuf| Ok(format!("{:08x}", checksum(file, mib)?));
        let all: Vec<_> = self.files.iter().skip(1).map(one).collect::<Result<_>>()?;
        let different: BTreeSet<_> = all.iter().collect();
        ensure!(different.len() == all.len(), "two disks have one content");
        Ok(all.join("+"))
    }
}

fn disks() -> Result<()> {
    let disks = Disks::new(4)?;
    let (owner, before) = (checksum(&disks.files[0], DISK)?, disks.checksums(1)?);
    let outcome = vm("sriov-block:n=4:mib=4,sriov-disable,dmesg-clean")
        .args(["--pf", &disks.option])
        .run_ok()?;
    ensure!(outcome.value("sriov-block", "crc32")? == before);
    ensure!(outcome.value("sriov-block", "written")? == disks.checksums(4)?);
    ensure!(outcome.number("sriov-disable", "removed")? == 4);
    ensure!(
        checksum(&disks.files[0], DISK)? == owner,
        "the owner's disk has changed"
    );
    Ok(())
}

fn flr_of_disks() -> Result<()> {
    let disks = Disks::new(4)?;
    let outcome = vm("flr-io:n=4:rounds=3,sriov-disable,dmesg-clean")
        .args(["--pf", &disks.option])
        .run_ok()?;
    ensure!(outcome.number("flr-io", "sibling_mib")? > 0);
    Ok(())
}

fn flr_of_owner() -> Result<()> {
    let outcome = vm("flr-pf:n=3:rounds=2,sriov-enable:n=4,sriov-disable,dmesg-clean")
        .args(["--pf", "net,vfs=4"])
        .run_ok()?;
    ensure!(outcome.number("flr-pf", "resets")? == 2);
    ensure!(outcome.number("sriov-enable", "bound")? == 4);
    Ok(())
}

fn flr_of_passed_disk() -> Result<()> {
    let disks = Disks::new(3)?;
    let outcome = vm("flr-io:pf=none:rounds=2,dmesg-clean")
        .args(["--pf", &disks.passthrough()])
        .run_ok()?;
    ensure!(outcome.number("flr-io", "sibling_mib")? > 0);
    Ok(())
}

/// Twice, because the stock driver has the function in between.
fn admin(pf: &str, strict: &str, vm: impl Fn(&str) -> Vm) -> Result<()> {
    let scenario =
        format!("admin-user:strict={strict},admin-user:strict={strict},sriov-enable:n=2");
    let outcome = vm(&scenario).args(["--pf", pf]).run_ok()?;
    ensure!(outcome.number("admin-user", "commands")? >= 20);
    ensure!(outcome.number("sriov-enable", "bound")? == 2);
    Ok(())
}

/// Linux asks before any VF is enabled, which a strict owner refuses: that costs it administration commands, and
/// nothing else.
fn strict() -> Result<()> {
    let outcome = vm("sriov-enable:n=4,sriov-ping:n=4:mib=4,sriov-disable")
        .args(["--pf", "net,vfs=4,strict-admin"])
        .run_ok()?;
    ensure!(outcome.number("sriov-enable", "bound")? == 4);
    Ok(())
}

fn two_owners() -> Result<()> {
    let disks = Disks::new(2)?;
    let scenario = "sriov-enable:pf=0:n=3,sriov-block:pf=1:n=2:mib=2,sriov-ping:pf=0:n=3:mib=4,\
                    sriov-disable:pf=0,flr-io:pf=1:n=2:rounds=1,sriov-disable:pf=1,dmesg-clean";
    let outcome = vm(scenario)
        .args(["--pf", "net,vfs=3", "--pf", &disks.option])
        .run_ok()?;
    ensure!(outcome.number("sriov-ping", "pairs")? == 6);
    Ok(())
}

fn uplink() -> Result<()> {
    with_tap("terntest1", 79, |parameters| {
        // The PF is eth0.
        Vm::new(format!(
            "sriov-enable:n=1,net-tap:dev=eth1:{parameters},dmesg-clean"
        ))
        .args(["--pf", "net,vfs=1,uplink-tap=terntest1"])
        .run_ok()
    })
}

fn shared() -> Result<()> {
    vm("net-ping:a=eth0:b=eth1:mib=4,sriov-ping:n=2:mib=4,dmesg-clean")
        .args(["--net", "switch=lan", "--pf", "net,vfs=2,switch=lan"])
        .run_ok()
        .map(drop)
}

/// What a guest sees of devices that were passed through: nothing that tells them from others.
fn expect_plain(outcome: &Outcome, functions: u64) -> Result<()> {
    // With the source of entropy.
    ensure!(
        outcome.number("pci", "virtio")? == functions + 1,
        "{}",
        outcome.stdout
    );
    Ok(())
}

fn passthrough() -> Result<()> {
    // More than a device without ARI has functions.
    let outcome = vm("pci,net-ping:a=eth0:b=eth15:mib=10,dmesg-clean")
        .args(["--pf", "net,vfs=16,passthrough"])
        .run_ok()?;
    expect_plain(&outcome, 16)
}

fn passthrough_disks() -> Result<()> {
    let disks = Disks::new(2)?;
    let outcome = vm("pci,block-write:dev=vdb:seed=5:mib=4,block-info:dev=vda,dmesg-clean")
        .args(["--pf", &disks.passthrough()])
        .run_ok()?;
    expect_plain(&outcome, 2)?;
    let written = outcome.value("block-write", "crc32")?;
    ensure!(
        disks.checksums(4)?.ends_with(&written),
        "{}",
        outcome.stdout
    );
    Ok(())
}
