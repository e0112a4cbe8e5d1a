//! Registers: vectors of every width the CPU has, masks, MMX and control words keep what is in them while their thread is
//! preempted, sleeps and goes on.

#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::is_x86_feature_detected as has;

use super::{Load, Turns};
use crate::{Failure, Result, pattern};

/// How often a thread spins and sleeps before its registers are looked at.
const NAPS: u64 = 4;
/// How long it spins, in turns of an empty loop.
const SPINS: u64 = 100_000;
/// How long it sleeps.
const NAP: [i64; 2] = [0, 3_000_000];
const NANOSLEEP: u64 = 35;
const SCHED_YIELD: u64 = 24;
/// Rounding and exceptions as nobody has them by default: SSE flushes to zero and rounds down; x87 rounds up.
const MXCSR: u32 = 0x3f80;
const X87_CONTROL: u16 = 0x0b7f;

/// A thread for each width and CPU. They take turns there, each with contents of its own.
pub fn start(load: &mut Load, cpus: usize) -> Result<()> {
    let widths = [Width::Xmm, Width::Ymm, Width::Zmm];
    for width in widths.into_iter().filter(|width| width.is_here()) {
        for cpu in 0..cpus {
            let place = format!("{} of CPU {cpu}", width.name());
            load.start("registers", place, Some(cpu), move |turns| {
                hold(turns, width, cpu as u64)
            });
        }
    }
    Ok(())
}

/// Which part of the vector registers a thread uses; the rest is in its initial state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Xmm,
    Ymm,
    Zmm,
}

impl Width {
    /// Whether the CPU has it, and the kernel lets it be used.
    fn is_here(self) -> bool {
        match self {
            Self::Xmm => true,
            Self::Ymm => has!("avx"),
            Self::Zmm => has!("avx512f") && has!("avx512bw"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Xmm => "xmm",
            Self::Ymm => "ymm",
            Self::Zmm => "zmm",
        }
    }

    /// 64-bit words per register, and registers.
    fn shape(self) -> (usize, usize) {
        match self {
            Self::Xmm => (2, 16),
            Self::Ymm => (4, 16),
            Self::Zmm => (8, 32),
        }
    }
}

/// What is in the registers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C, align(64))]
struct Registers {
    vectors: [[u64; 8]; 32],
    masks: [u64; 8],
    mmx: [u64; 8],
    mxcsr: u32,
    x87_control: u16,
}

impl Registers {
    const EMPTY: Self = Self {
        vectors: [[0; 8]; 32],
        masks: [0; 8],
        mmx: [0; 8],
        mxcsr: 0,
        x87_control: 0,
    };

    /// Contents that nothing else has.
    fn patterned(width: Width, seed: u64) -> Self {
        let (words, count) = width.shape();
        let mut found = Self::EMPTY;
        let mut numbers = (0..).map(|index| pattern::word(seed, index));
        let mut next = || numbers.next().unwrap_or_default();
        for register in &mut found.vectors[..count] {
            register[..words].fill_with(&mut next);
        }
        if width == Width::Zmm {
            found.masks.fill_with(&mut next);
        }
        found.mmx.fill_with(&mut next);
        (found.mxcsr, found.x87_control) = (MXCSR, X87_CONTROL);
        found
    }

    /// Fails with the first register that differs.
    fn verify(&self, expected: &Self, width: Width) -> Result<()> {
        let one = |name: &str, number: usize, found: &[u64], expected: &[u64]| {
            if found == expected {
                return Ok(());
            }
            Err(Failure(format!(
                "{name}{number} holds {found:016x?} instead of {expected:016x?}"
            )))
        };
        for (number, (a, b)) in self.vectors.iter().zip(&expected.vectors).enumerate() {
            one(width.name(), number, a, b)?;
        }
        for (number, (a, b)) in self.masks.iter().zip(&expected.masks).enumerate() {
            one("k", number, &[*a], &[*b])?;
        }
        for (number, (a, b)) in self.mmx.iter().zip(&expected.mmx).enumerate() {
            one("mm", number, &[*a], &[*b])?;
        }
        if (self.mxcsr, self.x87_control) == (expected.mxcsr, expected.x87_control) {
            return Ok(());
        }
        Err(Failure(format!(
            "MXCSR is {:#x}, and the x87 control word {:#x}",
            self.mxcsr, self.x87_control
        )))
    }
}

fn hold(turns: &Turns, width: Width, cpu: u64) -> Result<()> {
    let mut round = 0;
    while turns.goes_on() {
        let seed = (width.shape().0 as u64) << 48 ^ cpu << 32 ^ round;
        let before = Registers::patterned(width, seed);
        let after = pass(width, &before, NAPS, SPINS);
        after.verify(&before, width)?;
        round += 1;
        turns.add(1);
    }
    Ok(())
}

/// Loads all registers, spins and sleeps so often, and returns what is in the registers then.
fn pass(width: Width, from: &Registers, naps: u64, spins: u64) -> Registers {
    let mut to = Registers::EMPTY;
    // SAFETY: all of them load from `from`, store to `to`, which are as large as they expect, and have in between the
    // kernel execute sched_yield and nanosleep, which write to no memory; what they change is declared. The CPU has the
    // registers: x86-64 always has SSE2, and threads of other widths are started on CPUs that have them.
    unsafe {
        match width {
            Width::Xmm => pass_xmm(from, &mut to, naps, spins),
            Width::Ymm => pass_ymm(from, &mut to, naps, spins),
            Width::Zmm => pass_zmm(from, &mut to, naps, spins),
        }
    }
    to
}

/// `op reg0, [from]` and so on, each register 64 bytes after the other.
macro_rules! load {
    ($op:literal $register:literal: $($number:literal)*) => {
        concat!($($op, " ", $register, $number, ", [{from} + 64 * ", $number, "]\n"),*)
    };
}

/// `op [to], reg0` and so on.
macro_rules! store {
    ($op:literal $register:literal: $($number:literal)*) => {
        concat!($($op, " [{to} + 64 * ", $number, "], ", $register, $number, "\n"),*)
    };
}

/// The same for registers of 64 bits, `at` bytes behind.
macro_rules! load_words {
    ($op:literal $register:literal $at:literal: $($number:literal)*) => {
        concat!($($op, " ", $register, $number, ", [{from} + ", $at, " + 8 * ", $number, "]\n"),*)
    };
}

macro_rules! store_words {
    ($op:literal $register:literal $at:literal: $($number:literal)*) => {
        concat!($($op, " [{to} + ", $at, " + 8 * ", $number, "], ", $register, $number, "\n"),*)
    };
}

/// A function that loads, waits and stores. Offsets: masks at 2048, MMX at 2112, MXCSR at 2176, x87 control at 2180.
macro_rules! pass {
    ($name:ident, $features:literal, $load:expr, $store:expr, $clear:literal) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(from: &Registers, to: &mut Registers, naps: u64, spins: u64) {
            let mut default_mxcsr = 0u32;
            let mut default_control = 0u16;
            // SAFETY: as the caller has it.
            unsafe {
                asm!(
                    "stmxcsr [{mxcsr}]",
                    "fnstcw [{control}]",
                    "ldmxcsr [{from} + 2176]",
                    "fldcw [{from} + 2180]",
                    load_words!("movq" "mm" "2112": 0 1 2 3 4 5 6 7),
                    $load,
                    "2:",
                    "mov r8, {spins}",
                    "3:",
                    "dec r8",
                    "jnz 3b",
                    "mov eax, {sched_yield}",
                    "syscall",
                    "mov r8, {spins}",
                    "4:",
                    "dec r8",
                    "jnz 4b",
                    "mov rdi, {nap}",
                    "xor esi, esi",
                    "mov eax, {nanosleep}",
                    "syscall",
                    "dec {naps}",
                    "jnz 2b",
                    $store,
                    store_words!("movq" "mm" "2112": 0 1 2 3 4 5 6 7),
                    "stmxcsr [{to} + 2176]",
                    "fnstcw [{to} + 2180]",
                    "emms",
                    "ldmxcsr [{mxcsr}]",
                    "fldcw [{control}]",
                    $clear,
                    from = in(reg) from,
                    to = in(reg) to,
                    mxcsr = in(reg) &mut default_mxcsr,
                    control = in(reg) &mut default_control,
                    nap = in(reg) &NAP,
                    spins = in(reg) spins,
                    naps = inout(reg) naps => _,
                    sched_yield = const SCHED_YIELD,
                    nanosleep = const NANOSLEEP,
                    out("rax") _, out("rcx") _, out("rdi") _, out("rsi") _, out("r8") _, out("r11") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("xmm16") _, out("xmm17") _, out("xmm18") _, out("xmm19") _,
                    out("xmm20") _, out("xmm21") _, out("xmm22") _, out("xmm23") _,
                    out("xmm24") _, out("xmm25") _, out("xmm26") _, out("xmm27") _,
                    out("xmm28") _, out("xmm29") _, out("xmm30") _, out("xmm31") _,
                    out("k1") _, out("k2") _, out("k3") _, out("k4") _, out("k5") _, out("k6") _, out("k7") _,
                    out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
                    out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack),
                );
            }
        }
    };
}

pass!(
    pass_xmm,
    "sse2",
    load!("movups" "xmm": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
    store!("movups" "xmm": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
    ""
);
pass!(
    pass_ymm,
    "avx",
    load!("vmovups" "ymm": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
    store!("vmovups" "ymm": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
    "vzeroupper"
);
pass!(
    pass_zmm,
    "avx512f,avx512bw",
    concat!(
        load!("vmovups" "zmm": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
        load!("vmovups" "zmm": 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
        load_words!("kmovq" "k" "2048": 0 1 2 3 4 5 6 7)
    ),
    concat!(
        store!("vmovups" "zmm": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
        store!("vmovups" "zmm": 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
        store_words!("kmovq" "k" "2048": 0 1 2 3 4 5 6 7)
    ),
    "vzeroupper"
);

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn offsets_are_those_of_the_assembly() {
        assert_eq!(offset_of!(Registers, masks), 2048);
        assert_eq!(offset_of!(Registers, mmx), 2112);
        assert_eq!(offset_of!(Registers, mxcsr), 2176);
        assert_eq!(offset_of!(Registers, x87_control), 2180);
    }

    #[test]
    fn registers_of_every_width_keep_their_contents() {
        for width in [Width::Xmm, Width::Ymm, Width::Zmm] {
            if width.is_here() {
                let before = Registers::patterned(width, 9);
                let after = pass(width, &before, 2, 1000);
                after.verify(&before, width).unwrap();
            }
        }
    }

    #[test]
    fn arithmetic_is_as_before() {
        let quotient = |a: f64| std::hint::black_box(a) / 3.0;
        let before = quotient(1.0).to_bits();
        pass(Width::Xmm, &Registers::patterned(Width::Xmm, 1), 1, 1);
        assert_eq!(quotient(1.0).to_bits(), before);
    }

    #[test]
    fn the_register_that_differs_is_named() {
        let before = Registers::patterned(Width::Ymm, 1);
        for (change, text) in [
            (
                (|r: &mut Registers| r.vectors[7][3] ^= 1) as fn(&mut Registers),
                "ymm7 holds ",
            ),
            (|r| r.masks[2] = 1, "k2 holds "),
            (|r| r.mmx[5] = 1, "mm5 holds "),
            (|r| r.mxcsr = 0x1f80, "MXCSR is 0x1f80"),
        ] {
            let mut after = before.clone();
            change(&mut after);
            let error = after.verify(&before, Width::Ymm).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
