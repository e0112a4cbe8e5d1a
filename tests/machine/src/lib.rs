//! The KVM machine: a host with a usable `/dev/kvm`, real or emulated.
//!
//! Tests of a virtual machine monitor need KVM, and many hosts that run tests have none. This crate answers two
//! questions: [`probe`] measures whether the `/dev/kvm` of this host runs guest code at a usable speed, and
//! [`session`] runs a command in an emulated host that has one, under QEMU's TCG with SVM.
//!
//! The emulated host sees the file tree of the real one, so a binary that was built outside runs inside unchanged.
//! Standard streams, the terminal, signals and the exit status cross over a single virtio-serial port in the frames of
//! [`protocol`]; `machine-init`, the other half of this crate, is PID 1 in there.

pub mod probe;
pub mod protocol;
pub mod qemu;
pub mod session;
pub mod tty;
