//! Build, test and run everything: cargo xtask demo | test | kvm | bench | image.

fn main() {}
