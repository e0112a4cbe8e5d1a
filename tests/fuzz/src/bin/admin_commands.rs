//! Coverage-guided runs of [`fuzz::admin_commands`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::admin_commands(data));
