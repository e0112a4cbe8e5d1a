//! The state of one vCPU. Names are those of the processor's manuals, and of KVM where there is no other.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs2,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::{At, Invalid};
use super::super::hex::{Hex, HexBytes};
use super::super::version::Version;
use super::{Msr, msrs};
use crate::kvm::msrs::is_state;
use crate::kvm::state::vcpu::{self as kvm, LAPIC_SIZE, VcpuState};

mod events;
#[cfg(test)]
pub(in super::super) mod tests;

pub use events::Events;

/// The most extended control registers KVM takes.
const MAX_XCRS: usize = 16;

/// The state of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vcpu {
    /// Version of this section.
    pub version: Version<1>,
    /// What it does when it is let.
    pub mp_state: MpState,
    /// General registers.
    pub registers: Registers,
    /// Segments, tables and control registers.
    pub special_registers: SpecialRegisters,
    /// Extended control registers, ascending.
    pub xcrs: Vec<Xcr>,
    /// Debug registers.
    pub debug_registers: DebugRegisters,
    /// The time stamp counter at the moment of the clock.
    pub tsc: Hex<u64>,
    /// Exceptions, interrupts and the like that wait or are being delivered.
    pub events: Events,
    /// Model-specific registers, ascending.
    pub msrs: Vec<Msr>,
    /// Registers of the local interrupt controller: 1024 bytes.
    pub lapic: HexBytes,
    /// The XSAVE area, in the standard format and of the size the model says.
    pub xsave: HexBytes,
}

/// What a vCPU does when it is let.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MpState {
    /// Executes instructions.
    Runnable,
    /// Waits for INIT, having never had one.
    Uninitialized,
    /// Waits for a start-up interrupt.
    InitReceived,
    /// Waits for an interrupt.
    Halted,
    /// Has had a start-up interrupt and is about to execute.
    SipiReceived,
    /// Waits for INIT after a reset by firmware.
    ApResetHold,
}

impl From<kvm::MpState> for MpState {
    fn from(state: kvm::MpState) -> Self {
        match state {
            kvm::MpState::Runnable => Self::Runnable,
            kvm::MpState::Uninitialized => Self::Uninitialized,
            kvm::MpState::InitReceived => Self::InitReceived,
            kvm::MpState::Halted => Self::Halted,
            kvm::MpState::SipiReceived => Self::SipiReceived,
            kvm::MpState::ApResetHold => Self::ApResetHold,
        }
    }
}

impl From<MpState> for kvm::MpState {
    fn from(state: MpState) -> Self {
        match state {
            MpState::Runnable => Self::Runnable,
            MpState::Uninitialized => Self::Uninitialized,
            MpState::InitReceived => Self::InitReceived,
            MpState::Halted => Self::Halted,
            MpState::SipiReceived => Self::SipiReceived,
            MpState::ApResetHold => Self::ApResetHold,
        }
    }
}

/// Declares registers of 64 bits that have the same names in JSON and in a structure of KVM.
macro_rules! registers {
    ($(#[$doc:meta])* $name:ident, $kvm:ident: $($field:ident)*) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $(pub $field: Hex<u64>,)*
        }

        impl From<&$kvm> for $name {
            fn from(r: &$kvm) -> Self {
                Self { $($field: Hex(r.$field),)* }
            }
        }

        impl From<&$name> for $kvm {
            fn from(r: &$name) -> Self {
                Self { $($field: r.$field.0,)* }
            }
        }
    };
}

registers!(
    /// The general registers.
    Registers, kvm_regs:
    rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags
);

/// Segments, tables and control registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct SpecialRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: Table,
    pub idt: Table,
    pub cr0: Hex<u64>,
    pub cr2: Hex<u64>,
    pub cr3: Hex<u64>,
    pub cr4: Hex<u64>,
    pub cr8: Hex<u64>,
    pub efer: Hex<u64>,
    pub apic_base: Hex<u64>,
    /// The page directory pointers of 32-bit paging with physical address extension, if the vCPU uses that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pdptrs: Option<[Hex<u64>; 4]>,
}

/// A segment register with what the processor has read of its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Selector.
    pub selector: Hex<u16>,
    /// Linear address of the first byte.
    pub base: Hex<u64>,
    /// Offset of the last byte.
    pub limit: Hex<u32>,
    /// Type, 0 to 15.
    #[serde(rename = "type")]
    pub kind: u8,
    /// Code or data, not a system segment.
    pub s: bool,
    /// Privilege level, 0 to 3.
    pub dpl: u8,
    /// Present.
    pub present: bool,
    /// For the system's use.
    pub avl: bool,
    /// 64-bit code.
    pub l: bool,
    /// 32-bit code, or large stack.
    pub db: bool,
    /// The limit counts pages.
    pub g: bool,
    /// The register holds the null selector.
    pub unusable: bool,
}

impl Segment {
    fn of(s: &kvm_segment) -> Self {
        Self {
            selector: Hex(s.selector),
            base: Hex(s.base),
            limit: Hex(s.limit),
            kind: s.type_,
            s: s.s != 0,
            dpl: s.dpl,
            present: s.present != 0,
            avl: s.avl != 0,
            l: s.l != 0,
            db: s.db != 0,
            g: s.g != 0,
            unusable: s.unusable != 0,
        }
    }

    fn plain(&self) -> Result<kvm_segment, Invalid> {
        at_most(self.kind, 15).field("type")?;
        at_most(self.dpl, 3).field("dpl")?;
        Ok(kvm_segment {
            base: self.base.0,
            limit: self.limit.0,
            selector: self.selector.0,
            type_: self.kind,
            present: self.present.into(),
            dpl: self.dpl,
            db: self.db.into(),
            s: self.s.into(),
            l: self.l.into(),
            g: self.g.into(),
            avl: self.avl.into(),
            unusable: self.unusable.into(),
            padding: 0,
        })
    }
}

/// Where a descriptor table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Linear address of the first byte.
    pub base: Hex<u64>,
    /// Offset of the last byte.
    pub limit: Hex<u16>,
}

impl From<&kvm_dtable> for Table {
    fn from(t: &kvm_dtable) -> Self {
        Self {
            base: Hex(t.base),
            limit: Hex(t.limit),
        }
    }
}

impl From<&Table> for kvm_dtable {
    fn from(t: &Table) -> Self {
        Self {
            base: t.base.0,
            limit: t.limit.0,
            padding: [0; 3],
        }
    }
}

impl SpecialRegisters {
    fn of(s: &kvm_sregs2) -> Self {
        let valid = s.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
        Self {
            cs: Segment::of(&s.cs),
            ds: Segment::of(&s.ds),
            es: Segment::of(&s.es),
            fs: Segment::of(&s.fs),
            gs: Segment::of(&s.gs),
            ss: Segment::of(&s.ss),
            tr: Segment::of(&s.tr),
            ldt: Segment::of(&s.ldt),
            gdt: Table::from(&s.gdt),
            idt: Table::from(&s.idt),
            cr0: Hex(s.cr0),
            cr2: Hex(s.cr2),
            cr3: Hex(s.cr3),
            cr4: Hex(s.cr4),
            cr8: Hex(s.cr8),
            efer: Hex(s.efer),
            apic_base: Hex(s.apic_base),
            pdptrs: valid.then(|| s.pdptrs.map(Hex)),
        }
    }

    fn plain(&self) -> Result<kvm_sregs2, Invalid> {
        Ok(kvm_sregs2 {
            cs: self.cs.plain().field("cs")?,
            ds: self.ds.plain().field("ds")?,
            es: self.es.plain().field("es")?,
            fs: self.fs.plain().field("fs")?,
            gs: self.gs.plain().field("gs")?,
            ss: self.ss.plain().field("ss")?,
            tr: self.tr.plain().field("tr")?,
            ldt: self.ldt.plain().field("ldt")?,
            gdt: kvm_dtable::from(&self.gdt),
            idt: kvm_dtable::from(&self.idt),
            cr0: self.cr0.0,
            cr2: self.cr2.0,
            cr3: self.cr3.0,
            cr4: self.cr4.0,
            cr8: self.cr8.0,
            efer: self.efer.0,
            apic_base: self.apic_base.0,
            flags: self
                .pdptrs
                .map_or(0, |_| KVM_SREGS2_FLAGS_PDPTRS_VALID.into()),
            pdptrs: self.pdptrs.map_or([0; 4], |all| all.map(|p| p.0)),
        })
    }
}

/// An extended control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Xcr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: Hex<u64>,
}

/// Debug registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DebugRegisters {
    /// DR0 to DR3: addresses.
    pub addresses: [Hex<u64>; 4],
    /// DR6.
    pub dr6: Hex<u64>,
    /// DR7.
    pub dr7: Hex<u64>,
}

impl From<&kvm_debugregs> for DebugRegisters {
    fn from(d: &kvm_debugregs) -> Self {
        Self {
            addresses: d.db.map(Hex),
            dr6: Hex(d.dr6),
            dr7: Hex(d.dr7),
        }
    }
}

impl From<&DebugRegisters> for kvm_debugregs {
    fn from(d: &DebugRegisters) -> Self {
        Self {
            db: d.addresses.map(|a| a.0),
            dr6: d.dr6.0,
            dr7: d.dr7.0,
            ..Self::default()
        }
    }
}

impl Vcpu {
    /// The JSON of a vCPU in `state`.
    pub fn of(state: &VcpuState) -> Self {
        let VcpuState {
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            debugregs,
            lapic,
            tsc,
            msrs,
            events,
        } = state;
        let xcr = |(index, value): &(u32, u64)| Xcr {
            index: *index,
            value: Hex(*value),
        };
        Self {
            version: Version::default(),
            mp_state: (*mp_state).into(),
            registers: Registers::from(regs),
            special_registers: SpecialRegisters::of(sregs),
            xcrs: xcrs.iter().map(xcr).collect(),
            debug_registers: DebugRegisters::from(debugregs),
            tsc: Hex(*tsc),
            events: Events::of(events),
            msrs: msrs.iter().copied().map(Msr::of).collect(),
            lapic: HexBytes(lapic.to_vec()),
            xsave: HexBytes(xsave.clone()),
        }
    }

    /// The state, of a vCPU whose model has an XSAVE area of `xsave_size` bytes. KVM looks at it once more.
    ///
    /// # Errors
    ///
    /// What is in no vCPU.
    pub fn plain(&self, xsave_size: u32) -> Result<VcpuState, Invalid> {
        let lapic = <[u8; LAPIC_SIZE]>::try_from(self.lapic.0.as_slice());
        let lapic = lapic.map_err(|_| {
            let len = self.lapic.0.len();
            Invalid::at("lapic", format!("has {len} bytes, not {LAPIC_SIZE}"))
        })?;
        if self.xsave.0.len() != xsave_size as usize {
            let len = self.xsave.0.len();
            let reason = format!("has {len} bytes, and cpu_model.xsave_size is {xsave_size}");
            return Err(Invalid::at("xsave", reason));
        }
        Ok(VcpuState {
            mp_state: self.mp_state.into(),
            regs: kvm_regs::from(&self.registers),
            sregs: self.special_registers.plain().field("special_registers")?,
            xcrs: self.plain_xcrs().field("xcrs")?,
            xsave: self.xsave.0.clone(),
            debugregs: kvm_debugregs::from(&self.debug_registers),
            lapic: Box::new(lapic),
            tsc: self.tsc.0,
            msrs: msrs(&self.msrs, is_state).field("msrs")?,
            events: self.events.plain().field("events")?,
        })
    }

    fn plain_xcrs(&self) -> Result<Vec<(u32, u64)>, Invalid> {
        if self.xcrs.len() > MAX_XCRS {
            let reason = format!("{} registers are more than {MAX_XCRS}", self.xcrs.len());
            return Err(Invalid::new(reason));
        }
        let all: Vec<_> = self.xcrs.iter().map(|x| (x.index, x.value.0)).collect();
        let indices: Vec<_> = all.iter().map(|(index, _)| *index).collect();
        super::super::error::check_ascending(&indices)?;
        Ok(all)
    }
}

/// Rejects a number above `most`.
fn at_most(number: u8, most: u8) -> Result<(), Invalid> {
    if number > most {
        return Err(Invalid::new(format!("{number} is more than {most}")));
    }
    Ok(())
}
