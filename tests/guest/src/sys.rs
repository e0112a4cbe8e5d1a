//! System calls that cannot be expressed safely, each in a safe function.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Result;
use rustix::ioctl::{Getter, NoArg, Setter, ioctl, opcode};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// `linux/fs.h`: whether a block device is read-only.
const BLKROGET: u32 = opcode::none(0x12, 94);
/// `linux/fs.h`: throws a range away.
const BLKDISCARD: u32 = opcode::none(0x12, 119);
/// `linux/fs.h`: makes a range read as zeroes.
const BLKZEROOUT: u32 = opcode::none(0x12, 127);
/// `linux/fs.h`: drops what is cached of a device.
const BLKFLSBUF: u32 = opcode::none(0x12, 97);

/// Whether a block device is read-only.
pub fn is_read_only(device: &File) -> Result<bool> {
    // SAFETY: BLKROGET writes one int, which is what this getter has room for.
    let flag: i32 = unsafe { ioctl(device, Getter::<{ BLKROGET as _ }, i32>::new())? };
    Ok(flag != 0)
}

/// Discards `length` bytes at `start`.
pub fn discard(device: &File, start: u64, length: u64) -> Result<()> {
    // SAFETY: BLKDISCARD reads two u64, start and length.
    unsafe {
        ioctl(
            device,
            Setter::<{ BLKDISCARD as _ }, [u64; 2]>::new([start, length]),
        )
    }
}

/// Has `length` bytes at `start` read as zeroes.
pub fn write_zeroes(device: &File, start: u64, length: u64) -> Result<()> {
    // SAFETY: BLKZEROOUT reads two u64, start and length.
    unsafe {
        ioctl(
            device,
            Setter::<{ BLKZEROOUT as _ }, [u64; 2]>::new([start, length]),
        )
    }
}

/// Drops the page cache of a block device, so that the next read asks the device.
pub fn drop_cache(device: &File) -> Result<()> {
    // SAFETY: BLKFLSBUF takes no argument.
    unsafe { ioctl(device, NoArg::<{ BLKFLSBUF as _ }>::new()) }
}

/// Gives the calling thread a network namespace of its own.
pub fn new_network() -> Result<()> {
    // SAFETY: only CLONE_FILES and its like can invalidate what other code holds; sockets keep the namespace they were
    // made in.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Makes what `command` starts the leader of a session that has its standard input as its terminal.
pub fn own_terminal(command: &mut Command) {
    let hook = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: between fork and exec the hook makes two system calls; it neither allocates nor locks.
    unsafe { command.pre_exec(hook) };
}
