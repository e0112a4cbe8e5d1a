#![doc = include_str!("../README.md")]

pub mod acpi;
pub mod api;
pub mod boot;
pub mod chipset;
pub mod cli;
pub mod config;
pub mod console;
pub mod doctor;
pub mod exit;
pub mod kvm;
pub mod layout;
pub mod limits;
pub mod machine;
pub mod serial;
pub mod signals;
pub mod vcpu;
