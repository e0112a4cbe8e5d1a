//! What the kernel said about this machine, from `/dev/kmsg`.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

use crate::{Context, Failure, Result, check};

/// More than the longest record the kernel hands out.
const RECORD_MAX: usize = 8192;
/// Levels up to this one are warnings and worse.
const WARNING: u64 = 4;

/// What is bad at any level: the kernel reports failed resource assignment as mere information.
const BAD: [&str; 14] = [
    "can't assign",
    "can't claim",
    "failed to assign",
    "no space for",
    "not enough mmio",
    "bar 0: error",
    "admin command error",
    "kernel bug at",
    "general protection fault",
    "blocked for more than",
    "soft lockup",
    "hard lockup",
    "detected stall",
    "marking clocksource",
];
/// What Linux 6.1 says early of every machine without the I/O ports of conventional PCI, until ACPI tells it better.
const HARMLESS: &str = "pci: fatal: no config space access function found";
/// What a warning or an error is bad about.
const OURS: [&str; 4] = ["virtio", "pci", "iov", "vf"];

/// A place in the log: everything after it is new.
pub struct Mark(Option<u64>);

impl Mark {
    /// The beginning of the log, when the kernel started.
    pub fn boot() -> Self {
        Self(None)
    }

    /// The end of the log as it is now.
    pub fn now() -> Result<Self> {
        Ok(Self(read()?.last().map(|record| record.sequence)))
    }

    /// Fails if the kernel complained after this place; otherwise says how much it said.
    pub fn check_clean(&self) -> Result<usize> {
        let records = read()?;
        // Records older than the ring buffer are lost, and a complaint may have been among them.
        let next = self.0.map_or(0, |last| last + 1);
        let first = records.first().map_or(next, |record| record.sequence);
        check(first <= next, || "the kernel log has lost records".into())?;
        let new = records.iter().filter(|record| record.sequence >= next);
        let mut count = 0;
        for record in new {
            count += 1;
            // What is wrong with the CPUs of a machine shows when it boots, and is none of our business here.
            let trace = self.0.is_some() && record.text.starts_with("WARNING: ");
            check(!trace && !record.is_complaint(), || {
                format!("the kernel says: {}", record.text)
            })?;
        }
        Ok(count)
    }

    /// How many messages after this place contain this text, which is written in lower case.
    pub fn count(&self, text: &str) -> Result<usize> {
        let next = self.0.map_or(0, |last| last + 1);
        let records = read()?;
        let new = records.iter().filter(|record| record.sequence >= next);
        Ok(new.filter(|record| record.contains(&[text])).count())
    }

    /// Fails if a message after this place contains one of these words, which are written in lower case.
    pub fn check_without(&self, words: &[&str]) -> Result<()> {
        let next = self.0.map_or(0, |last| last + 1);
        for record in read()?.iter().filter(|record| record.sequence >= next) {
            check(!record.contains(words), || {
                format!("the kernel says: {}", record.text)
            })?;
        }
        Ok(())
    }
}

struct Record {
    level: u64,
    sequence: u64,
    text: String,
}

impl Record {
    /// `level+facility,sequence,microseconds,flags;text`, then lines with a dictionary.
    fn parse(record: &str) -> Option<Self> {
        let (head, rest) = record.split_once(';')?;
        let mut fields = head.split(',');
        let priority: u64 = fields.next()?.parse().ok()?;
        Some(Self {
            level: priority & 7,
            sequence: fields.next()?.parse().ok()?,
            text: rest.lines().next()?.to_owned(),
        })
    }

    fn is_complaint(&self) -> bool {
        let harmless = self.text.to_ascii_lowercase() == HARMLESS;
        let warning = self.level <= WARNING && self.contains(&OURS) && !harmless;
        self.contains(&BAD) || warning
    }

    fn contains(&self, words: &[&str]) -> bool {
        let text = self.text.to_ascii_lowercase();
        words.iter().any(|word| text.contains(word))
    }
}

/// All records that are still there.
fn read() -> Result<Vec<Record>> {
    let mut log = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open("/dev/kmsg")
        .context("/dev/kmsg")?;
    let mut records = Vec::new();
    let mut buffer = [0; RECORD_MAX];
    loop {
        match log.read(&mut buffer) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&buffer[..length]);
                let record = Record::parse(&text)
                    .ok_or_else(|| Failure(format!("/dev/kmsg: what is this? {text}")))?;
                records.push(record);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(records),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The record was overwritten while it was read; what follows is there.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error).context("/dev/kmsg"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_parsed() {
        let record = Record::parse("30,42,1234,-;pci 0000:01:00.0: hello\n SUBSYSTEM=pci\n");
        let record = record.unwrap();
        assert_eq!((record.level, record.sequence), (6, 42));
        assert_eq!(record.text, "pci 0000:01:00.0: hello");
        assert!(Record::parse("no record").is_none());
    }

    #[test]
    fn complaints_are_told_from_chatter() {
        let complaint = |record: &str| Record::parse(record).unwrap().is_complaint();
        for record in [
            "6,1,0,-;pci 0000:01:00.0: BAR 0 [mem size 0x4000 64bit pref]: can't assign; no space",
            "6,1,0,-;pci 0000:01:00.0: VF BAR 0 [mem size 0x40000]: failed to assign",
            "3,1,0,-;virtio-pci 0000:01:00.0: not enough MMIO resources for SR-IOV",
            "6,1,0,-;virtio-pci 0000:01:00.0: admin command error: status(0x16) qualifier(0x2)",
            "4,1,0,-;pci 0000:01:00.0: not ready 1023ms after FLR; waiting",
            "3,1,0,-;virtio_net virtio3: something",
            "0,1,0,-;watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [init:1]",
            "3,1,0,-;rcu: INFO: rcu_preempt self-detected stall on CPU",
            "4,1,0,-;clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable",
        ] {
            assert!(complaint(record), "{record}");
        }
        for record in [
            "6,1,0,-;pci 0000:01:00.0: [1af4:1041] type 00 class 0x020000 PCIe Endpoint",
            "6,1,0,-;pci 0000:00:01.0:   bridge window [mem 0x4000000000-0x40001fffff]",
            "3,1,0,-;PCI: Fatal: No config space access function found",
            "4,1,0,-;WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:605",
            "6,1,0,-;virtio_net virtio3 eth1: renamed",
        ] {
            assert!(!complaint(record), "{record}");
        }
    }
}
