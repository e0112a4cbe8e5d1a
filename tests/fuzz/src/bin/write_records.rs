//! Coverage-guided runs of [`fuzz::write_records`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::write_records(data));
