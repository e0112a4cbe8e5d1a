//! Coverage-guided runs of [`fuzz::sriov_config`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::sriov_config(data));
