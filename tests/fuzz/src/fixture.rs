//! Functions to fuzz.

use std::sync::Arc;

use devices::virtio::VirtioFunction;
use driver::host::{Controls, HostDma, Loopback, Shape, run_until_idle};

/// A function, and the controls of its device if it is a loopback.
pub struct Rig {
    pub function: Arc<VirtioFunction>,
    pub controls: Option<Controls>,
}

impl Rig {
    /// A function with a loopback device.
    pub fn loopback(dma: &HostDma) -> (Self, Controls) {
        let (device, controls) = Loopback::new(Shape::default()).expect("event");
        let function = VirtioFunction::new("fuzz", device, dma.view().clone()).expect("events");
        let rig = Self {
            function,
            controls: Some(controls.clone()),
        };
        (rig, controls)
    }

    /// A function with device number `kind`, whatever number it is.
    pub fn any(kind: u8, dma: &HostDma) -> Self {
        let _ = kind;
        Self::loopback(dma).0
    }

    /// Lets the function work until it is idle; one that never is spins for ever.
    pub fn settle(&self) {
        assert!(
            run_until_idle(&self.function, 4096),
            "the device never rests"
        );
    }
}
