//! Extended capabilities, from offset 0x100 of configuration space, one per file.

pub mod ari;
pub mod sriov;
