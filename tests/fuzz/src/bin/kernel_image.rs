//! Coverage-guided runs of [`fuzz::kernel_image`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::kernel_image(data));
