#![doc = include_str!("../README.md")]

pub mod bar;
pub mod cap;
pub mod config;
pub mod decode;
pub mod ecap;
pub mod function;
pub mod header;
pub mod host_bridge;
pub mod msix;
pub mod owner;
pub mod root;
pub mod root_port;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
pub mod topology;
pub mod virtio;
