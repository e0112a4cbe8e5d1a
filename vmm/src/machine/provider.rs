//! Where the devices of a machine get what the host gives them, and what the machine keeps of it.
//!
//! | way | disks | taps |
//! |---|---|---|
//! | by name | opened and locked | attached to, or created |
//! | [received](Provider::received) | come open from another process, with their lock | come open, and are left alone until the machine runs |
//! | [without locks](Provider::without_locks) | opened; [`take_locks`](super::functions::Functions::take_locks) when the other process is done with them | as by name |
//!
//! The names are those of functions: `disk0`, `net0`, `pf0`, `pf0-vf1`; and `pf0-uplink`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use devices::block::{BlockError, RawFile};
use devices::io::IoThread;
use devices::net::{
    AnnouncementControl, Announcements, Announcer, Tap, TapError, TapHandle, UplinkControl,
};

use super::functions::FunctionError;

/// Files that came from another process and that no device has a use for.
#[derive(Debug, thiserror::Error)]
#[error("another process gave {0}, which no device of this machine takes")]
pub struct LeftOver(String);

/// Gives devices their files. See the [module documentation](self).
pub struct Provider {
    received: BTreeMap<String, OwnedFd>,
    locks: bool,
    given: HostSide,
}

impl Provider {
    /// Everything is opened by its name, and locked.
    pub fn by_name() -> Self {
        Self {
            received: BTreeMap::new(),
            locks: true,
            given: HostSide::default(),
        }
    }

    /// The devices named in `files` take these; all others are as before.
    #[must_use]
    pub fn received(mut self, files: BTreeMap<String, OwnedFd>) -> Self {
        self.received = files;
        self
    }

    /// Disks that are opened by their name are not locked.
    #[must_use]
    pub fn without_locks(mut self) -> Self {
        self.locks = false;
        self
    }

    /// The file of disk `name`.
    pub(super) fn disk(
        &mut self,
        name: &str,
        path: &Path,
        read_only: bool,
    ) -> Result<Arc<RawFile>, BlockError> {
        let disk = Arc::new(match self.received.remove(name) {
            Some(file) => RawFile::received(file, path, read_only)?,
            None if self.locks => RawFile::open(path, read_only)?,
            None => RawFile::open_unlocked(path, read_only)?,
        });
        self.given.disks.push((name.to_owned(), Arc::clone(&disk)));
        Ok(disk)
    }

    /// The tap of network device or uplink `name`, which the host calls `tap`.
    pub(super) fn tap(&mut self, name: &str, tap: &str) -> Result<Tap, TapError> {
        let tap = match self.received.remove(name) {
            Some(file) => Tap::received(file, tap)?,
            None => Tap::open(tap)?,
        };
        self.given.taps.push((name.to_owned(), tap.handle()));
        Ok(tap)
    }

    /// The machine has an uplink, which stops and goes on with it.
    pub(super) fn uplink(&mut self, control: UplinkControl) {
        self.given.uplinks.push(control);
    }

    /// The machine has an address that can be announced.
    pub(super) fn announcer(&mut self, announcer: Announcer) {
        self.given.announcers.push(announcer);
    }

    /// What was given, once every device has what it needs.
    pub(super) fn finish(self) -> Result<HostSide, LeftOver> {
        let left: Vec<_> = self.received.into_keys().collect();
        match left.is_empty() {
            true => Ok(self.given),
            false => Err(LeftOver(left.join(", "))),
        }
    }
}

/// What the devices of a machine have of the host, for those who move the machine: the devices themselves know nothing of
/// that.
#[derive(Default)]
pub(super) struct HostSide {
    disks: Vec<(String, Arc<RawFile>)>,
    taps: Vec<(String, TapHandle)>,
    uplinks: Vec<UplinkControl>,
    /// Those that are not served yet.
    announcers: Vec<Announcer>,
    announcements: Option<AnnouncementControl>,
}

impl HostSide {
    /// Has `io` send announcements, once every device has what it needs.
    pub(super) fn serve(&mut self, io: &IoThread) -> Result<(), FunctionError> {
        if self.announcers.is_empty() {
            return Ok(());
        }
        let announcements = Announcements::new(std::mem::take(&mut self.announcers))?;
        self.announcements = Some(announcements.control());
        Ok(io.add(Box::new(announcements))?)
    }

    /// See [`Functions::take_locks`](super::functions::Functions::take_locks).
    pub(super) fn take_locks(&self) -> Result<(), Vec<String>> {
        let mut taken = Vec::new();
        let mut in_use = Vec::new();
        for (name, disk) in &self.disks {
            match disk.take_lock() {
                Ok(true) => taken.push(disk),
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(disk = %name, %error, "cannot lock disk");
                    in_use.push(name.clone());
                }
            }
        }
        if in_use.is_empty() {
            return Ok(());
        }
        for disk in taken {
            disk.release_lock();
        }
        Err(in_use)
    }

    /// See [`Functions::release_locks`](super::functions::Functions::release_locks).
    pub(super) fn release_locks(&self) {
        for (_, disk) in &self.disks {
            disk.release_lock();
        }
    }

    /// See [`Functions::sync`](super::functions::Functions::sync).
    pub(super) fn sync(&self) -> Result<(), String> {
        for (name, disk) in self.disks.iter().filter(|(_, disk)| !disk.is_lent()) {
            disk.sync().map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(())
    }

    /// See [`Functions::lend`](super::functions::Functions::lend).
    pub(super) fn lend(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let disks = self.disks.iter();
        let disks = disks.map(|(name, disk)| (name, disk.duplicate()));
        let taps = self.taps.iter();
        let taps = taps.map(|(name, tap)| (name, tap.duplicate()));
        let lent = disks
            .chain(taps)
            .map(|(name, file)| Ok((name.clone(), file?)))
            .collect::<io::Result<_>>()?;
        for (_, disk) in &self.disks {
            disk.set_lent(true);
        }
        Ok(lent)
    }

    /// See [`Functions::end_lending`](super::functions::Functions::end_lending).
    pub(super) fn end_lending(&self) {
        for (_, disk) in &self.disks {
            disk.set_lent(false);
        }
    }

    /// The machine runs from now on.
    pub(super) fn open(&self) {
        for (_, tap) in &self.taps {
            tap.release();
        }
        for uplink in &self.uplinks {
            uplink.reopen();
        }
        if let Some(announcements) = &self.announcements {
            announcements.reopen();
        }
    }

    /// The machine was stopped, all functions before this.
    pub(super) fn close(&self) {
        if let Some(announcements) = &self.announcements {
            announcements.close();
        }
        for uplink in &self.uplinks {
            uplink.close();
        }
    }

    /// See [`Functions::announce`](super::functions::Functions::announce).
    pub(super) fn announce(&self) {
        if let Some(announcements) = &self.announcements {
            announcements.start();
        }
    }
}

#[cfg(test)]
mod tests;
