//! Coverage-guided runs of [`fuzz::context_sessions`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::context_sessions(data));
