//! End-to-end tests: stock Linux guests under tern in the KVM machine.
