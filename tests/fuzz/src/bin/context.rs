//! Coverage-guided runs of [`fuzz::context`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::context(data));
