//! Coverage-guided runs of [`fuzz::snapshot_restore`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::snapshot_restore(data));
