//! Booting: kernels, vCPUs, memory sizes, and how a guest may end.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;
use crate::vm::Vm;

/// Exit statuses of `tern run`, as its `--help` documents them.
pub mod status {
    pub const POWER_OFF: i32 = 0;
    pub const RESET: i32 = 3;
    pub const PANIC: i32 = 4;
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (cpus, memory, megabytes) in [
        (1, "128M", 128),
        (2, "128M", 128),
        (1, "512M", 512),
        (2, "512M", 512),
        (1, "4G", 4096),
        (2, "4G", 4096),
    ] {
        trials.push(trial(
            format!("boot::linux_6_12_with_{cpus}_cpus_and_{memory}"),
            move || boots("vmlinuz-6.12", "6.12", cpus, memory, megabytes),
        ));
    }
    trials.extend([
        trial("boot::linux_6_1_with_1_cpu", || {
            boots("vmlinuz-6.1", "6.1", 1, "512M", 512)
        }),
        trial("boot::linux_6_1_with_4_cpus", || {
            boots("vmlinuz-6.1", "6.1", 4, "1G", 1024)
        }),
        trial("boot::an_elf_kernel_boots", || {
            boots("vmlinux-6.12", "6.12", 1, "512M", 512)
        }),
        trial("boot::memory_above_the_gap_holds_what_is_written", || {
            Vm::new("memory-touch:mib=3400")
                .args(["--memory", "4G"])
                .run_ok()
                .map(drop)
        }),
        trial("boot::power_off_exits_0", || {
            ends("poweroff", status::POWER_OFF)
        }),
        trial("boot::reset_has_a_status_of_its_own", || {
            ends("reset", status::RESET)
        }),
        trial("boot::panic_has_a_status_of_its_own", || {
            ends("panic", status::PANIC)
        }),
        trial("boot::entropy_comes_from_virtio_rng", || {
            Vm::new("entropy").run_ok().map(drop)
        }),
    ]);
    trials
}

fn boots(
    kernel: &'static str,
    series: &'static str,
    cpus: u64,
    memory: &str,
    megabytes: u64,
) -> Result<()> {
    let outcome = Vm::new("boot")
        .kernel(kernel, series)
        .args(["--cpus", &cpus.to_string(), "--memory", memory])
        .run_ok()?;
    ensure!(
        outcome.number("boot", "cpus")? == cpus,
        "{}",
        outcome.stdout
    );
    // The kernel keeps its own image, some 40 MiB, and its page tables and structs, which grow with memory.
    let total = outcome.number("boot", "mem_kib")? / 1024;
    let least = megabytes - 48 - megabytes / 20;
    ensure!(
        (least..=megabytes).contains(&total),
        "the guest sees {total} MiB of {megabytes}"
    );
    let release = outcome.value("boot", "release")?;
    ensure!(
        release.starts_with(&format!("{series}.")),
        "booted {release}"
    );
    Ok(())
}

fn ends(scenario: &str, code: i32) -> Result<()> {
    Vm::new(scenario).run()?.expect_code(code)
}
