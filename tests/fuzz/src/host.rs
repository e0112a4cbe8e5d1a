//! What the user of the monitor gives it: kernels, configuration files, options.

use std::io::Cursor;
use std::path::PathBuf;

use devices::memory::GuestRam;
use devices::net::MacAddress;
use vmm::boot::image;
use vmm::boot::load::{Prepared, Sources};
use vmm::config::Config;
use vmm::config::options::{Disk, Net};
use vmm::layout;

use crate::input::Input;

/// A file that claims to be a kernel, with an initial RAM disk behind it: it is recognised or refused, and what is
/// loaded stays within memory.
pub fn kernel_image(data: &[u8]) {
    let mut input = Input::new(data);
    let initrd = usize::from(input.word());
    let kernel = input.rest();
    if image::identify(&mut Cursor::new(kernel)).is_err() {
        return;
    }
    let ram = layout::MIN_RAM;
    let memory = GuestRam::new(&layout::ram_ranges(ram)).expect("RAM");
    let view = memory.view().expect("view");
    let directory = tempfile::tempdir().expect("directory");
    let file = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).expect("file");
        path
    };
    let sources = Sources {
        kernel: file("kernel", kernel),
        initrd: (initrd != 0).then(|| file("initrd", &vec![0xa5; initrd])),
        cmdline: "console=ttyS0".to_owned(),
    };
    let Ok(prepared) = Prepared::open(ram, &sources) else {
        return;
    };
    if let Ok(entry) = prepared.load(&view) {
        assert!(entry.rip < ram, "entry {:#x} outside memory", entry.rip);
    }
}

/// A configuration file, and the options of the command line: what is accepted can be written and read again.
pub fn configuration(data: &[u8]) {
    if let Ok(config) = serde_json::from_slice::<Config>(data) {
        let text = serde_json::to_vec(&config).expect("what was read can be written");
        let again: Config = serde_json::from_slice(&text).expect("and read again");
        assert_eq!(again, config);
        let _ = config.resolve();
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(disk) = text.parse::<Disk>() {
        assert_eq!(disk.to_string().parse(), Ok(disk));
    }
    if let Ok(net) = text.parse::<Net>() {
        assert_eq!(net.to_string().parse(), Ok(net));
    }
    if let Ok(mac) = text.parse::<MacAddress>() {
        assert_eq!(mac.to_string().parse(), Ok(mac));
    }
    if let Ok(bytes) = layout::parse_memory_size(text) {
        let text = layout::format_memory_size(bytes);
        assert_eq!(layout::parse_memory_size(&text).ok(), Some(bytes), "{text}");
    }
}
