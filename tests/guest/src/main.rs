//! Init of the test guest: one static binary, driven by the kernel command line.

fn main() {}
