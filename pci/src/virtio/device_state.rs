//! The device-state structure (S0): one virtqueue at a time, stopped and started, and where it goes on.
//!
//! | offset | width | register | |
//! |---|---|---|---|
//! | 0 | 2 | queue_select | which virtqueue the other two are of; not that of the common configuration |
//! | 2 | 2 | last_avail_idx | the available-ring entry that is fetched next; 0, and read-only, while the queue runs |
//! | 4 | 1 | queue_status | 1 while the queue runs |
//!
//! Bytes 5 to 7 read 0 (G0-k). A queue that does not exist reads 0 and ignores writes (G0-c).

use devices::virtio::VirtioFunction;

/// Length of the structure in bytes.
pub const LEN: u64 = 8;

/// Reads at byte `offset`, in any width.
pub fn read(function: &VirtioFunction, offset: u64, data: &mut [u8]) {
    let queue = function.selectors().state_queue;
    let mut bytes = [0; LEN as usize];
    let [a, b, c, d, status, ..] = &mut bytes;
    [*a, *b] = queue.to_le_bytes();
    [*c, *d] = function.next_available(queue).to_le_bytes();
    *status = function.queue_runs(queue).into();
    let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
    data.fill(0);
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}

/// Writes one whole register, or the first two at once. Other writes are ignored, and so are values of queue_status that
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
        _ => {}
    }
}
