//! Driver-side virtio: the other end of every device, for tests on the host and inside a guest.
