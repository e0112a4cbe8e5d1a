//! Coverage-guided runs of [`fuzz::virtio_registers`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::virtio_registers(data));
