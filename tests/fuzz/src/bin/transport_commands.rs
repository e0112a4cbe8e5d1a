//! Coverage-guided runs of [`fuzz::transport_commands`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::transport_commands(data));
