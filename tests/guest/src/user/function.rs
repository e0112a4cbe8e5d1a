//! A PCI function's registers through sysfs: `config` and `resourceN`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use driver::access::Function;

use super::mapping::Mapping;
use crate::{Context, Result};

/// A function without a driver that would object.
pub struct SysfsFunction {
    config: File,
    /// Vendor and device. A virtual function's registers do not give them; the kernel has them from its PF.
    ids: [u8; 4],
    bars: BTreeMap<u8, Mapping>,
}

impl SysfsFunction {
    /// Opens the function in this directory of sysfs, and maps its memory BARs: those the kernel has given an address.
    /// It does not let them be mapped while a driver has them.
    pub fn open(path: &Path) -> Result<Self> {
        let mut function = Self::without_bars(path)?;
        for bar in 0..6 {
            let name = format!("resource{bar}");
            if let Ok(data) = fs::metadata(path.join(&name)) {
                let file = open(path, &name)?;
                let mapping = Mapping::of_file(file, data.len() as usize).context(&name)?;
                function.bars.insert(bar, mapping);
            }
        }
        Ok(function)
    }

    /// Opens configuration space alone.
    pub fn without_bars(path: &Path) -> Result<Self> {
        let id = |name: &str| {
            let text = fs::read_to_string(path.join(name)).context(name)?;
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).context(name)
        };
        let [v0, v1] = id("vendor")?.to_le_bytes();
        let [d0, d1] = id("device")?.to_le_bytes();
        Ok(Self {
            config: open(path, "config")?,
            ids: [v0, v1, d0, d1],
            bars: BTreeMap::new(),
        })
    }
}

fn open(path: &Path, name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open(path.join(name));
    file.context(name)
}

impl Function for SysfsFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if self.config.read_exact_at(data, offset.into()).is_err() {
            data.fill(0xff);
        }
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.ids.get(at).copied().unwrap_or(*byte);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        // What cannot be written is lost.
        let _ = self.config.write_all_at(data, offset.into());
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match (self.bars.get(&bar), usize::try_from(offset)) {
            (Some(mapping), Ok(offset)) => mapping.read(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if let (Some(mapping), Ok(offset)) = (self.bars.get(&bar), usize::try_from(offset)) {
            mapping.write(offset, data);
        }
    }

    fn relax(&self) {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use driver::access::FunctionExt;
    use driver::pci::header;

    use super::*;

    /// A directory that looks like one of sysfs: a function that does not give its ids, with BAR 0.
    #[test]
    fn registers_are_files() {
        let path = std::env::temp_dir().join(format!("tern-sysfs-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("vendor"), "0x1af4\n").unwrap();
        fs::write(path.join("device"), "0x1041\n").unwrap();
        let mut config = vec![0; 4096];
        config[..4].fill(0xff);
        config[header::REVISION as usize] = 1;
        fs::write(path.join("config"), config).unwrap();
        fs::write(path.join("resource0"), vec![7; 4096]).unwrap();
        let function = SysfsFunction::open(&path).unwrap();
        assert_eq!(function.config::<u32>(0), 0x1041_1af4);
        assert_eq!(function.config::<u8>(header::REVISION), 1);
        assert_eq!(function.config::<u32>(4094), u32::MAX);
        function.set_config(header::COMMAND, 6u16);
        assert_eq!(function.config::<u16>(header::COMMAND), 6);
        function.write_bar(0, 8, &[1, 2]);
        let mut bytes = [0; 4];
        function.read_bar(0, 7, &mut bytes);
        assert_eq!(bytes, [7, 1, 2, 7]);
        function.read_bar(1, 0, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        fs::remove_dir_all(&path).unwrap();
    }
}
