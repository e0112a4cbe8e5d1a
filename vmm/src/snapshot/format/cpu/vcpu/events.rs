//! Exceptions, interrupts and the like that wait or are being delivered.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::super::error::{At, Invalid};
use super::super::super::hex::Hex;
use super::at_most;

/// Exceptions, interrupts and the like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// An exception.
    pub exception: Exception,
    /// An interrupt.
    pub interrupt: Interrupt,
    /// Non-maskable interrupts.
    pub nmi: Nmi,
    /// The page a vCPU starts at.
    pub sipi_vector: u8,
    /// System management mode.
    pub smi: Smi,
    /// A triple fault waits.
    pub triple_fault: bool,
    /// Which of the members say something.
    pub valid: Valid,
}

/// An exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// It is being delivered.
    pub injected: bool,
    /// It waits.
    pub pending: bool,
    /// Its vector, 0 to 31.
    pub vector: u8,
    /// It has an error code.
    pub has_error_code: bool,
    /// The error code.
    pub error_code: Hex<u32>,
    /// It has something for CR2 or DR6.
    pub has_payload: bool,
    /// What it has for CR2 or DR6.
    pub payload: Hex<u64>,
}

/// An interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Interrupt {
    /// It is being delivered.
    pub injected: bool,
    /// Its vector.
    pub vector: u8,
    /// An instruction caused it.
    pub soft: bool,
    /// The next instruction is not interrupted: 1 after a load of SS, 2 after STI, 3 after either.
    pub shadow: u8,
}

/// Non-maskable interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nmi {
    /// One is being delivered.
    pub injected: bool,
    /// How many wait, 0 to 2.
    pub pending: u8,
    /// They are masked until IRET.
    pub masked: bool,
}

/// System management mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Smi {
    /// The vCPU is in it.
    pub smm: bool,
    /// An interrupt into it waits.
    pub pending: bool,
    /// It was entered while NMIs were masked.
    pub inside_nmi: bool,
    /// An INIT waits for its end.
    pub latched_init: bool,
}

/// Which members of [`Events`] say something; KVM ignores the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Valid {
    /// `nmi.pending`.
    pub nmi_pending: bool,
    /// `sipi_vector`.
    pub sipi_vector: bool,
    /// `interrupt.shadow`.
    pub shadow: bool,
    /// `smi`.
    pub smi: bool,
    /// `exception.pending` and the payload.
    pub payload: bool,
    /// `triple_fault`.
    pub triple_fault: bool,
}

impl Valid {
    fn of(flags: u32) -> Self {
        let has = |flag| flags & flag != 0;
        Self {
            nmi_pending: has(KVM_VCPUEVENT_VALID_NMI_PENDING),
            sipi_vector: has(KVM_VCPUEVENT_VALID_SIPI_VECTOR),
            shadow: has(KVM_VCPUEVENT_VALID_SHADOW),
            smi: has(KVM_VCPUEVENT_VALID_SMM),
            payload: has(KVM_VCPUEVENT_VALID_PAYLOAD),
            triple_fault: has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT),
        }
    }

    fn flags(self) -> u32 {
        let all = [
            (self.nmi_pending, KVM_VCPUEVENT_VALID_NMI_PENDING),
            (self.sipi_vector, KVM_VCPUEVENT_VALID_SIPI_VECTOR),
            (self.shadow, KVM_VCPUEVENT_VALID_SHADOW),
            (self.smi, KVM_VCPUEVENT_VALID_SMM),
            (self.payload, KVM_VCPUEVENT_VALID_PAYLOAD),
            (self.triple_fault, KVM_VCPUEVENT_VALID_TRIPLE_FAULT),
        ];
        all.iter()
            .filter(|(valid, _)| *valid)
            .fold(0, |flags, (_, flag)| flags | flag)
    }
}

impl Events {
    pub(super) fn of(e: &kvm_vcpu_events) -> Self {
        Self {
            exception: Exception {
                injected: e.exception.injected != 0,
                pending: e.exception.pending != 0,
                vector: e.exception.nr,
                has_error_code: e.exception.has_error_code != 0,
                error_code: Hex(e.exception.error_code),
                has_payload: e.exception_has_payload != 0,
                payload: Hex(e.exception_payload),
            },
            interrupt: Interrupt {
                injected: e.interrupt.injected != 0,
                vector: e.interrupt.nr,
                soft: e.interrupt.soft != 0,
                shadow: e.interrupt.shadow,
            },
            nmi: Nmi {
                injected: e.nmi.injected != 0,
                pending: e.nmi.pending,
                masked: e.nmi.masked != 0,
            },
            // Eight bits of an interrupt command.
            sipi_vector: e.sipi_vector as u8,
            smi: Smi {
                smm: e.smi.smm != 0,
                pending: e.smi.pending != 0,
                inside_nmi: e.smi.smm_inside_nmi != 0,
                latched_init: e.smi.latched_init != 0,
            },
            triple_fault: e.triple_fault.pending != 0,
            valid: Valid::of(e.flags),
        }
    }

    pub(super) fn plain(&self) -> Result<kvm_vcpu_events, Invalid> {
        at_most(self.exception.vector, 31).field("exception.vector")?;
        at_most(self.interrupt.shadow, 3).field("interrupt.shadow")?;
        at_most(self.nmi.pending, 2).field("nmi.pending")?;
        let mut e = kvm_vcpu_events {
            sipi_vector: self.sipi_vector.into(),
            flags: self.valid.flags(),
            exception_has_payload: self.exception.has_payload.into(),
            exception_payload: self.exception.payload.0,
            ..Default::default()
        };
        e.exception.injected = self.exception.injected.into();
        e.exception.pending = self.exception.pending.into();
        e.exception.nr = self.exception.vector;
        e.exception.has_error_code = self.exception.has_error_code.into();
        e.exception.error_code = self.exception.error_code.0;
        e.interrupt.injected = self.interrupt.injected.into();
        e.interrupt.nr = self.interrupt.vector;
        e.interrupt.soft = self.interrupt.soft.into();
        e.interrupt.shadow = self.interrupt.shadow;
        e.nmi.injected = self.nmi.injected.into();
        e.nmi.pending = self.nmi.pending;
        e.nmi.masked = self.nmi.masked.into();
        e.smi.smm = self.smi.smm.into();
        e.smi.pending = self.smi.pending.into();
        e.smi.smm_inside_nmi = self.smi.inside_nmi.into();
        e.smi.latched_init = self.smi.latched_init.into();
        e.triple_fault.pending = self.triple_fault.into();
        Ok(e)
    }
}
