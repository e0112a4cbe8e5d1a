//! Coverage-guided runs of [`fuzz::migration_stream`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::migration_stream(data));
