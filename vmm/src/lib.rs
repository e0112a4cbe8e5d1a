//! The tern virtual machine monitor.
