//! Getting a Linux kernel, its initial RAM disk and its command line into guest memory.
//!
//! | module | what it does |
//! |---|---|
//! | [`image`] | recognises a kernel image and checks everything about it before anything is loaded |
//! | [`load`] | puts kernel, initial RAM disk and command line where they belong |
//! | [`params`] | the memory map and the zero page |
//! | [`long_mode`] | page tables, segments and registers of a processor that starts in 64-bit mode |

pub mod image;
pub mod load;
pub mod long_mode;
pub mod params;

/// Where and how the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical address of the first instruction, in 64-bit mode.
    pub rip: u64,
    /// Guest physical address of the zero page, which the kernel expects in RSI.
    pub zero_page: u64,
}
