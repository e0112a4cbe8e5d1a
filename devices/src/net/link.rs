//! What a network device is plugged into.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::memory::View;
use crate::virtio::Chain;

/// Length of the `virtio_net_hdr` in front of every frame.
pub const HEADER_LEN: usize = 12;
/// Where the header counts the chains a frame was put into.
pub const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// The shortest frame: two addresses and a type.
pub const FRAME_MIN: usize = 14;
/// The longest: 64 KiB of a segmentation offload, with room for addresses, type and a VLAN tag.
pub const FRAME_MAX: usize = 65_535 + 18;

/// Something that carries frames for a network device.
///
/// Called with the device's function locked; none of the methods blocks. Frames include their header of 12 bytes.
pub trait Link: Send {
    /// Readable when frames came in; watched edge-triggered.
    fn event_fd(&self) -> RawFd;

    /// Feature bits of the offloads this link can carry.
    fn offloads(&self) -> u64;

    /// The driver is ready and accepted `features`.
    fn up(&mut self, features: u64);

    /// The driver is gone: frames that wait for it are dropped, and so are those that come.
    fn down(&mut self);

    /// Sends the frame in the device-readable bytes of `chain`, or counts why it could not. Receivers may not notice
    /// before [`Self::flush`].
    fn send(&mut self, view: &View, chain: &Chain);

    /// The sender pauses: receivers notice what was sent.
    fn flush(&mut self);

    /// The frame that came in first, if any. The same again until [`Self::consume`].
    fn peek(&mut self) -> Option<&mut [u8]>;

    /// Removes the frame that [`Self::peek`] showed.
    fn consume(&mut self);

    /// What went through.
    fn counters(&self) -> &Arc<Counters>;
}

/// Counts of one network device, as the driver sees directions. Updated while the device runs.
#[derive(Debug, Default)]
pub struct Counters {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_overflow: AtomicU64,
    rx_oversize: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_malformed: AtomicU64,
    tx_refused: AtomicU64,
    tx_spoofed: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Frames given to the driver.
    pub rx_frames: u64,
    /// Bytes given to the driver, without headers.
    pub rx_bytes: u64,
    /// Frames dropped because too many already waited for the driver.
    pub rx_overflow: u64,
    /// Frames dropped because they were longer than the driver's buffers.
    pub rx_oversize: u64,
    /// Frames taken from the driver.
    pub tx_frames: u64,
    /// Bytes taken from the driver, without headers.
    pub tx_bytes: u64,
    /// Frames dropped because they were none: too short, too long, or with a header that makes no sense.
    pub tx_malformed: u64,
    /// Frames the host would not take.
    pub tx_refused: u64,
    /// Frames dropped because the driver may not send from their source address.
    pub tx_spoofed: u64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Counters {
    /// All counts now.
    pub fn snapshot(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_overflow: get(&self.rx_overflow),
            rx_oversize: get(&self.rx_oversize),
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_malformed: get(&self.tx_malformed),
            tx_refused: get(&self.tx_refused),
            tx_spoofed: get(&self.tx_spoofed),
        }
    }

    pub(super) fn received(&self, bytes: usize) {
        add(&self.rx_frames, 1);
        add(&self.rx_bytes, bytes as u64);
    }

    pub(super) fn overflow(&self) {
        add(&self.rx_overflow, 1);
    }

    pub(super) fn oversize(&self) {
        add(&self.rx_oversize, 1);
    }

    pub(super) fn sent(&self, bytes: usize) {
        add(&self.tx_frames, 1);
        add(&self.tx_bytes, bytes as u64);
    }

    pub(super) fn malformed(&self) {
        add(&self.tx_malformed, 1);
    }

    pub(super) fn refused(&self) {
        add(&self.tx_refused, 1);
    }

    pub(super) fn spoofed(&self) {
        add(&self.tx_spoofed, 1);
    }
}

/// The length of the frame in `chain` without its header, if it can be one.
pub fn frame_len(chain: &Chain) -> Option<usize> {
    let len = usize::try_from(chain.readable_len()).ok()?;
    len.checked_sub(HEADER_LEN)
        .filter(|len| (FRAME_MIN..=FRAME_MAX).contains(len))
}
