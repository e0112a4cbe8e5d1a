//! Bad input: each is refused with a status, the name of the thing, and a cure; nothing is left behind.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use crate::trial;
use crate::vm::{image, output, tern};

/// A command line that must be refused: name, arguments, status, and what the message must contain.
struct Refusal {
    name: &'static str,
    arguments: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
}

/// `{kernel}` and `{initrd}` are the good ones; `{dir}` is a directory with the files of [`prepare`].
const REFUSALS: &[Refusal] = &[
    refusal(
        "a_missing_kernel",
        &["--kernel", "{dir}/nothing"],
        1,
        &["nothing"],
    ),
    refusal(
        "an_empty_kernel",
        &["--kernel", "{dir}/empty"],
        1,
        &["empty"],
    ),
    refusal(
        "a_directory_as_kernel",
        &["--kernel", "{dir}"],
        1,
        &["directory"],
    ),
    refusal(
        "a_truncated_kernel",
        &["--kernel", "{dir}/truncated"],
        1,
        &["truncated"],
    ),
    refusal("text_as_kernel", &["--kernel", "{dir}/text"], 1, &["text"]),
    refusal(
        "a_32_bit_elf_kernel",
        &["--kernel", "{dir}/elf32"],
        1,
        &["elf32", "64"],
    ),
    refusal(
        "a_missing_initrd",
        &["--kernel", "{kernel}", "--initrd", "{dir}/nothing"],
        1,
        &["nothing"],
    ),
    refusal(
        "an_initrd_that_does_not_fit",
        &[
            "--kernel",
            "{kernel}",
            "--initrd",
            "{dir}/huge",
            "--memory",
            "128M",
        ],
        1,
        &["huge", "--memory"],
    ),
    refusal(
        "an_unknown_option",
        &["--kernel", "{kernel}", "--colour", "blue"],
        2,
        &["--colour"],
    ),
    refusal("no_kernel", &[], 2, &["--kernel"]),
    refusal(
        "too_little_memory",
        &["--kernel", "{kernel}", "--memory", "1M"],
        2,
        &["memory"],
    ),
    refusal(
        "memory_that_is_no_size",
        &["--kernel", "{kernel}", "--memory", "lots"],
        2,
        &["lots"],
    ),
    refusal(
        "no_cpus",
        &["--kernel", "{kernel}", "--cpus", "0"],
        2,
        &["cpus"],
    ),
    refusal(
        "too_many_cpus",
        &["--kernel", "{kernel}", "--cpus", "100000"],
        2,
        &["cpus"],
    ),
    refusal(
        "a_missing_disk",
        &["--kernel", "{kernel}", "--disk", "path={dir}/nothing"],
        1,
        &["nothing"],
    ),
    refusal(
        "a_directory_as_disk",
        &["--kernel", "{kernel}", "--disk", "path={dir}"],
        1,
        &["directory"],
    ),
    refusal(
        "a_disk_that_is_not_a_multiple_of_512",
        &["--kernel", "{kernel}", "--disk", "path={dir}/text"],
        1,
        &["512"],
    ),
    refusal(
        "a_disk_without_a_path",
        &["--kernel", "{kernel}", "--disk", "readonly"],
        2,
        &["path="],
    ),
    refusal(
        "an_unknown_disk_key",
        &[
            "--kernel",
            "{kernel}",
            "--disk",
            "path={dir}/huge,colour=blue",
        ],
        2,
        &["colour"],
    ),
    refusal(
        "an_owner_of_nobody",
        &["--kernel", "{kernel}", "--pf", "net,vfs=0"],
        2,
        &["vfs=0", "255"],
    ),
    refusal(
        "more_vfs_than_a_bus_has_places",
        &["--kernel", "{kernel}", "--pf", "net,vfs=256"],
        2,
        &["vfs=256", "255"],
    ),
    refusal(
        "an_owner_of_disks_without_disks",
        &["--kernel", "{kernel}", "--pf", "block,vfs=2"],
        2,
        &["path="],
    ),
    refusal(
        "one_file_for_all_vfs",
        &[
            "--kernel",
            "{kernel}",
            "--pf",
            "block,vfs=2,path={dir}/a.raw,vf-path={dir}/b.raw",
        ],
        2,
        &["vf-path", "%d"],
    ),
    refusal(
        "a_vf_whose_disk_is_missing",
        &[
            "--kernel",
            "{kernel}",
            "--pf",
            "block,vfs=2,path={dir}/huge,vf-path={dir}/none-%d.raw",
        ],
        1,
        &["none-1.raw"],
    ),
    refusal(
        "an_owner_with_unknown_commands",
        &["--kernel", "{kernel}", "--pf", "net,vfs=2,admin=v9"],
        2,
        &["v9", "draft"],
    ),
    refusal(
        "a_disk_for_a_network_owner",
        &["--kernel", "{kernel}", "--pf", "net,vfs=2,path={dir}/huge"],
        2,
        &["path=", "block"],
    ),
    refusal(
        "no_managed_devices",
        &["--kernel", "{kernel}", "--manager", "net,devices=0"],
        2,
        &["devices=0", "between 1 and 255"],
    ),
    refusal(
        "managed_disks_without_a_number",
        &[
            "--kernel",
            "{kernel}",
            "--manager",
            "block,devices=1,path={dir}/huge",
        ],
        2,
        &["does not have %d once"],
    ),
    refusal(
        "a_missing_disk_of_a_manager",
        &[
            "--kernel",
            "{kernel}",
            "--manager",
            "block,devices=1,path={dir}/none%d",
        ],
        1,
        &["none0", "does not exist"],
    ),
    refusal(
        "a_disk_and_a_managed_disk_on_one_file",
        &[
            "--kernel",
            "{kernel}",
            "--disk",
            "path=/dev/none1",
            "--manager",
            "block,devices=1,path=/dev/none%d",
        ],
        2,
        &["--manager", "(device 1)", "belongs to one disk"],
    ),
    refusal(
        "two_features_with_one_number",
        &[
            "--kernel",
            "{kernel}",
            "--manager",
            "net,devices=1,queue-feature=46",
        ],
        2,
        &["queue-feature", "devices-feature", "46"],
    ),
    refusal(
        "a_tap_name_that_is_too_long",
        &[
            "--kernel",
            "{kernel}",
            "--net",
            "tap=a-name-longer-than-fifteen",
        ],
        2,
        &["15"],
    ),
    refusal(
        "a_net_that_is_both",
        &["--kernel", "{kernel}", "--net", "tap=a,switch=b"],
        2,
        &["tap", "switch"],
    ),
    refusal(
        "a_socket_path_that_is_too_long",
        &["--kernel", "{kernel}", "--api-socket", "{long}"],
        1,
        &["107"],
    ),
    refusal(
        "a_config_file_that_is_not_json",
        &["--config", "{dir}/text"],
        2,
        &["text"],
    ),
    refusal(
        "a_config_file_with_an_unknown_field",
        &["--config", "{dir}/unknown.json"],
        2,
        &["colour"],
    ),
    refusal(
        "two_consoles_on_stdio",
        &[
            "--kernel",
            "{kernel}",
            "--console",
            "stdio",
            "--virtio-console",
            "stdio",
        ],
        2,
        &["stdio"],
    ),
];

const fn refusal(
    name: &'static str,
    arguments: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
) -> Refusal {
    Refusal {
        name,
        arguments,
        code,
        says,
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<_> = REFUSALS
        .iter()
        .map(|r| trial(format!("refusals::{}", r.name), move || check(r)))
        .collect();
    trials.push(trial(
        "refusals::standard_output_that_takes_nothing",
        output_lost,
    ));
    trials
}

/// A reader that has gone is no error, and a full disk is one of the command, which does not crash for either.
fn output_lost() -> Result<()> {
    let doctor = |output: Stdio| {
        let mut command = Command::new(tern()?);
        command.arg("doctor").stdout(output).stderr(Stdio::piped());
        let told = command.spawn()?.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&told.stderr).into_owned();
        anyhow::Ok((told.status.code(), stderr))
    };
    let mut usable = Command::new(tern()?);
    usable.arg("doctor");
    let usable = output(usable)?.status.code();
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let gone = doctor(writer.into())?;
    ensure!(gone == (usable, String::new()), "{gone:?}");
    let full = doctor(File::options().write(true).open("/dev/full")?.into())?;
    let says = full.1.contains("standard output cannot be written");
    ensure!(full.0 == Some(1) && says, "{full:?}");
    Ok(())
}

fn prepare(dir: &Path) -> Result<()> {
    File::create(dir.join("empty"))?;
    std::fs::write(dir.join("text"), "this is not a kernel, nor a disk\n")?;
    let kernel = std::fs::read(image("vmlinuz-6.12")?)?;
    std::fs::write(
        dir.join("truncated"),
        kernel.get(..100_000).context("a small kernel")?,
    )?;
    // ELF magic, class 1: 32 bits.
    let mut elf = File::create(dir.join("elf32"))?;
    elf.write_all(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0")?;
    elf.set_len(4096)?;
    File::create(dir.join("huge"))?.set_len(200 << 20)?;
    std::fs::write(
        dir.join("unknown.json"),
        r#"{"kernel": "vmlinuz", "colour": "blue"}"#,
    )?;
    Ok(())
}

fn check(refusal: &Refusal) -> Result<()> {
    let dir = tempfile::tempdir()?;
    prepare(dir.path())?;
    let before = std::fs::read_dir(dir.path())?.count();
    let long = dir.path().join("x".repeat(120));
    let (kernel, initrd) = (
        image("vmlinuz-6.12")?.display().to_string(),
        image("initramfs-6.12.cpio")?.display().to_string(),
    );
    let arguments = refusal.arguments.iter().map(|argument| {
        argument
            .replace("{dir}", &dir.path().display().to_string())
            .replace("{long}", &long.display().to_string())
            .replace("{kernel}", &kernel)
            .replace("{initrd}", &initrd)
    });
    let mut command = Command::new(tern()?);
    command.arg("run").args(arguments).current_dir(dir.path());
    let output = output(command)?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(refusal.code),
        "{}: {message}",
        output.status
    );
    for part in refusal.says {
        ensure!(message.contains(part), "{part:?} is not in: {message}");
    }
    ensure!(!message.contains("panicked"), "{message}");
    ensure!(
        std::fs::read_dir(dir.path())?.count() == before,
        "files were left behind"
    );
    Ok(())
}
