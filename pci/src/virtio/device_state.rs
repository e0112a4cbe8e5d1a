//! The device-state structure (S0): one virtqueue at a time, stopped and started, and where it goes on.
//!
//! | offset | width | register | |
//! |---|---|---|---|
//! | 0 | 2 | queue_select | which virtqueue the other two are of; not that of the common configuration |
//! | 2 | 2 | last_avail_idx | the available-ring entry that is fetched next; 0, and read-only, while the queue runs |
//! | 4 | 1 | queue_status | 1 while the queue runs |
//!
//! Bytes 5 to 7 read 0 (G0-k). A queue that does not exist reads 0 and ignores writes (G0-c).
//!
//! A function that offers packed rings has more of it, for positions in these: the offset of a descriptor in bits 0 to 14, the
//! wrap counter in bit 15 (G0-i). Of split rings they read 0 and ignore writes.
//!
//! | offset | width | register | |
//! |---|---|---|---|
//! | 8 | 2 | last_avail_off_wrap | the same as last_avail_idx; written, it sets last_used_off_wrap, too |
//! | 10 | 2 | last_used_off_wrap | the descriptor that is used next; 0, and read-only, while the queue runs |
//!
//! Bytes 12 to 15 read 0.

use devices::virtio::VirtioFunction;

/// Length of the structure in bytes.
pub const LEN: u64 = 8;
/// Its length for a function that offers packed rings.
pub const PACKED_LEN: u64 = 16;

/// Length of the structure of `function`; 0 if it has none.
pub fn len(function: &VirtioFunction) -> u64 {
    match (function.doors().queue_status, function.offers_packed()) {
        (false, _) => 0,
        (true, false) => LEN,
        (true, true) => PACKED_LEN,
    }
}

/// Reads at byte `offset`, in any width.
pub fn read(function: &VirtioFunction, offset: u64, data: &mut [u8]) {
    let queue = function.selectors().state_queue;
    let mut bytes = [0; PACKED_LEN as usize];
    let next_available = function.next_available(queue).to_le_bytes();
    let [a, b, c, d, status, _, _, _, e, f, g, h, ..] = &mut bytes;
    [*a, *b] = queue.to_le_bytes();
    [*c, *d] = next_available;
    *status = function.queue_runs(queue).into();
    if function.is_packed() {
        [*e, *f] = next_available;
        [*g, *h] = function.next_used(queue).to_le_bytes();
    }
    let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
    data.fill(0);
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}

/// Writes one whole register, or two neighbours at once. Other writes are ignored, and so are values of queue_status that
/// are none (G0-d).
pub fn write(function: &VirtioFunction, offset: u64, data: &[u8]) {
    let queue = function.selectors().state_queue;
    match (offset, data) {
        (0, [a, b]) => function.select(|s| s.state_queue = u16::from_le_bytes([*a, *b])),
        (0, [a, b, c, d]) => {
            let queue = u16::from_le_bytes([*a, *b]);
            function.select(|s| s.state_queue = queue);
            function.set_next_available(queue, u16::from_le_bytes([*c, *d]));
        }
        (2, [a, b]) => function.set_next_available(queue, u16::from_le_bytes([*a, *b])),
        (4, [status @ (0 | 1), rest @ ..]) if rest.iter().all(|byte| *byte == 0) => {
            function.run_queue(queue, *status == 1);
        }
        (8, [a, b, rest @ ..]) if function.is_packed() => {
            function.set_next_available(queue, u16::from_le_bytes([*a, *b]));
            if let [a, b] = rest {
                function.set_next_used(queue, u16::from_le_bytes([*a, *b]));
            }
        }
        (10, [a, b]) => function.set_next_used(queue, u16::from_le_bytes([*a, *b])),
        _ => {}
    }
}
