//! Coverage-guided runs of [`fuzz::queue_device_side`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::queue_device_side(data));
