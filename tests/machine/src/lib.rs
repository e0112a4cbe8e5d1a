//! The KVM machine: a host with a usable /dev/kvm, real or emulated.
