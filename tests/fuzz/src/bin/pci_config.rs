//! Coverage-guided runs of [`fuzz::pci_config`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::pci_config(data));
