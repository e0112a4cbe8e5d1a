//! What the driver needs from the place it runs in.
//!
//! [`Function`] reaches one PCI function's registers, [`Dma`] the memory the function reaches. On the host both are
//! implemented over the monitor's own buses; inside a guest, over what the kernel gives a process.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One PCI function, as its driver reaches it.
///
/// Accesses never fail, as on a real bus: what cannot be read reads as all ones, what cannot be written is lost.
/// `data` is 1, 2, 4 or 8 bytes long, in little-endian order, and becomes one access of that width.
pub trait Function {
    /// Reads configuration space at `offset` (0 to 4095).
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space at `offset`.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// Reads BAR `bar` (0 to 5), `offset` bytes from its start.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes BAR `bar`, `offset` bytes from its start.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);

    /// Called while the driver waits for the device: lets the device work if it shares this thread, and otherwise
    /// gives the processor away for a moment.
    fn relax(&self);
}

/// Memory that is shared with a device. Addresses are those the device uses.
pub trait Dma {
    /// Takes `len` zeroed bytes, contiguous for the device, at a multiple of `align` (a power of two). Never address
    /// 0. They are given back when the `Dma` goes. `None` if there are none left.
    fn allocate(&self, len: usize, align: usize) -> Option<u64>;

    /// Reads bytes; memory that is not there reads as all ones.
    fn read(&self, address: u64, data: &mut [u8]);

    /// Writes bytes; what falls on memory that is not there is lost.
    fn write(&self, address: u64, data: &[u8]);

    /// Reads the little-endian 16 bits at an even `address` at once; later reads are not moved before it (acquire).
    fn load(&self, address: u64) -> u16;

    /// Writes the little-endian 16 bits at an even `address` at once, after all earlier writes (release).
    fn store(&self, address: u64, value: u16);
}

macro_rules! delegate {
    ($($pointer:ty),*) => {$(
        impl<T: Function + ?Sized> Function for $pointer {
            fn read_config(&self, offset: u16, data: &mut [u8]) {
                (**self).read_config(offset, data);
            }
            fn write_config(&self, offset: u16, data: &[u8]) {
                (**self).write_config(offset, data);
            }
            fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
                (**self).read_bar(bar, offset, data);
            }
            fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
                (**self).write_bar(bar, offset, data);
            }
            fn relax(&self) {
                (**self).relax();
            }
        }

        impl<T: Dma + ?Sized> Dma for $pointer {
            fn allocate(&self, len: usize, align: usize) -> Option<u64> {
                (**self).allocate(len, align)
            }
            fn read(&self, address: u64, data: &mut [u8]) {
                (**self).read(address, data);
            }
            fn write(&self, address: u64, data: &[u8]) {
                (**self).write(address, data);
            }
            fn load(&self, address: u64) -> u16 {
                (**self).load(address)
            }
            fn store(&self, address: u64, value: u16) {
                (**self).store(address, value);
            }
        }
    )*};
}
delegate!(&T, Arc<T>, Rc<T>);

/// An integer with the width of a register.
pub trait Word: Copy {
    /// The integer's bytes.
    type Bytes: AsRef<[u8]> + AsMut<[u8]> + Default;

    /// From little-endian bytes.
    fn from_le(bytes: Self::Bytes) -> Self;

    /// To little-endian bytes.
    fn to_le(self) -> Self::Bytes;
}

macro_rules! word {
    ($($int:ty),*) => {$(
        impl Word for $int {
            type Bytes = [u8; size_of::<$int>()];
            fn from_le(bytes: Self::Bytes) -> Self {
                <$int>::from_le_bytes(bytes)
            }
            fn to_le(self) -> Self::Bytes {
                self.to_le_bytes()
            }
        }
    )*};
}
word!(u8, u16, u32, u64);

/// A register of a structure: where it is, and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register<T> {
    /// Byte offset within its structure.
    pub offset: u64,
    width: std::marker::PhantomData<T>,
}

impl<T> Register<T> {
    /// The register at `offset`.
    pub const fn at(offset: u64) -> Self {
        Self {
            offset,
            width: std::marker::PhantomData,
        }
    }
}

/// Part of a BAR, as a capability describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The BAR, 0 to 5.
    pub bar: u8,
    /// Byte offset within the BAR.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Typed accesses for any [`Function`].
pub trait FunctionExt: Function {
    /// Reads a configuration space field.
    fn config<T: Word>(&self, offset: u16) -> T {
        let mut bytes = T::Bytes::default();
        self.read_config(offset, bytes.as_mut());
        T::from_le(bytes)
    }

    /// Writes a configuration space field.
    fn set_config<T: Word>(&self, offset: u16, value: T) {
        self.write_config(offset, value.to_le().as_ref());
    }

    /// Reads `register` of the structure in `region`. The end of the region is not enforced.
    fn get<T: Word>(&self, region: Region, register: Register<T>) -> T {
        let mut bytes = T::Bytes::default();
        self.read_bar(
            region.bar,
            region.offset.wrapping_add(register.offset),
            bytes.as_mut(),
        );
        T::from_le(bytes)
    }

    /// Writes `register` of the structure in `region`. The end of the region is not enforced.
    fn set<T: Word>(&self, region: Region, register: Register<T>, value: T) {
        self.write_bar(
            region.bar,
            region.offset.wrapping_add(register.offset),
            value.to_le().as_ref(),
        );
    }

    /// Relaxes until `done`, at most for `patience`; true if it was.
    fn wait_until(&self, patience: Duration, mut done: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if done() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            self.relax();
        }
    }
}

impl<F: Function + ?Sized> FunctionExt for F {}

/// Typed accesses for any [`Dma`].
pub trait DmaExt: Dma {
    /// Reads an integer.
    fn get<T: Word>(&self, address: u64) -> T {
        let mut bytes = T::Bytes::default();
        self.read(address, bytes.as_mut());
        T::from_le(bytes)
    }

    /// Writes an integer.
    fn set<T: Word>(&self, address: u64, value: T) {
        self.write(address, value.to_le().as_ref());
    }

    /// Reads `len` bytes.
    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes);
        bytes
    }

    /// Puts `bytes` into memory of their own and says where.
    fn place(&self, bytes: &[u8]) -> Option<u64> {
        let address = self.allocate(bytes.len().max(1), 16)?;
        self.write(address, bytes);
        Some(address)
    }
}

impl<D: Dma + ?Sized> DmaExt for D {}

/// A piece of DMA memory that is used again and again, and grows when it must.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scratch {
    address: u64,
    len: usize,
}

impl Scratch {
    /// Address of at least `len` bytes. What was there before stays, unless the memory had to grow.
    pub fn reserve(&mut self, dma: &impl Dma, len: usize) -> Option<u64> {
        if self.len < len || self.address == 0 {
            let len = len.next_power_of_two().max(64);
            self.address = dma.allocate(len, 16)?;
            self.len = len;
        }
        Some(self.address)
    }
}
