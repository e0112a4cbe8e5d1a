//! One vCPU: everything KVM keeps of it.
//!
//! What is read first may change what is read later, and what is set first decides what KVM takes later:
//!
//! | reading | because |
//! |---|---|
//! | `mp_state` first | KVM takes in INIT and SIPI for it |
//! | events before registers | without [`Capabilities::exception_payload`], KVM moves the payload of one into CR2 or DR6 |
//! | MSRs before the LAPIC | a timer that expires in between is then pending in the LAPIC and armed as well, and fires once: its vector can only be pending once. The other way round it is in neither, and the vCPU sleeps for ever |
//!
//! | setting | because |
//! |---|---|
//! | CPUID, TSC frequency | everything is checked against them |
//! | `mp_state`, special registers | they reset parts of the others; the base of the LAPIC must be there before the LAPIC |
//! | LAPIC, TSC, MSRs | the mode of the timer is in the LAPIC, and deadlines count by the TSC |
//! | IA32_TSC_DEADLINE last of the MSRs | it arms the timer; one that has passed fires at once |
//! | events last | other registers drop events that wait |

use std::io;

use kvm_bindings::{
    KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcr,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::clock::Sample;
use super::{StateError, ioctl};
use crate::kvm::model::{Capabilities, CpuModel};
use crate::kvm::msrs;

/// Bytes of a local interrupt controller's registers.
pub const LAPIC_SIZE: usize = 1024;

/// Registers KVM takes in one call.
const MSRS_AT_ONCE: usize = 256;

/// What a vCPU does when it is let.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MpState {
    /// It executes instructions.
    Runnable,
    /// It waits for INIT, having never had one.
    Uninitialized,
    /// It waits for a start-up interrupt.
    InitReceived,
    /// It waits for an interrupt.
    Halted,
    /// It has had a start-up interrupt and is about to execute.
    SipiReceived,
    /// It waits for INIT after a reset by firmware.
    ApResetHold,
}

impl MpState {
    /// All, with KVM's numbers.
    const ALL: [(Self, u32); 6] = [
        (Self::Runnable, KVM_MP_STATE_RUNNABLE),
        (Self::Uninitialized, KVM_MP_STATE_UNINITIALIZED),
        (Self::InitReceived, KVM_MP_STATE_INIT_RECEIVED),
        (Self::Halted, KVM_MP_STATE_HALTED),
        (Self::SipiReceived, KVM_MP_STATE_SIPI_RECEIVED),
        (Self::ApResetHold, KVM_MP_STATE_AP_RESET_HOLD),
    ];

    fn from_kvm(number: u32) -> Option<Self> {
        let found = Self::ALL.iter().find(|(_, n)| *n == number);
        found.map(|(state, _)| *state)
    }

    fn to_kvm(self) -> u32 {
        let found = Self::ALL.iter().find(|(state, _)| *state == self);
        found.map_or(KVM_MP_STATE_RUNNABLE, |(_, number)| *number)
    }
}

/// The state of one vCPU.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuState {
    /// What it does.
    pub mp_state: MpState,
    /// General registers.
    pub regs: kvm_regs,
    /// Special registers.
    pub sregs: kvm_sregs2,
    /// Extended control registers: number and value.
    pub xcrs: Vec<(u32, u64)>,
    /// The XSAVE area.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Registers of the local interrupt controller.
    pub lapic: Box<[u8; LAPIC_SIZE]>,
    /// The time stamp counter at the moment of the clock.
    pub tsc: u64,
    /// Model-specific registers, in ascending order: number and value.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions, interrupts and the like that wait or are being delivered.
    pub events: kvm_vcpu_events,
}

/// What a time stamp counter is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct TscReading {
    /// What the guest would read, and when.
    pub(super) counter: Sample<u64>,
    /// What of it is added to the host's, if KVM tells.
    pub(super) offset: Option<u64>,
}

impl TscReading {
    pub(super) fn take(vcpu: &VcpuFd, id: usize) -> Result<Self, StateError> {
        let offset = ioctl::get_tsc_offset(vcpu);
        let counter = Sample::take(|| {
            read_msr(vcpu, msrs::IA32_TSC).ok_or_else(|| StateError::Read {
                vcpu: id,
                what: "the time stamp counter",
                source: io::ErrorKind::Unsupported.into(),
            })
        })?;
        Ok(Self { counter, offset })
    }
}

/// How KVM is asked, on this host.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) capabilities: Capabilities,
    /// Bytes of KVM's XSAVE area.
    pub(super) xsave_size: u32,
}

impl VcpuState {
    /// Reads the state of vCPU `id`, but for its TSC: how that relates to the others' is for the caller to find out.
    pub(super) fn save(
        vcpu: &VcpuFd,
        id: usize,
        model_msrs: &[u32],
        access: &Access,
    ) -> Result<(Self, TscReading), StateError> {
        let failed = |what| {
            move |error: kvm_ioctls::Error| StateError::Read {
                vcpu: id,
                what,
                source: error.into(),
            }
        };
        let failed_io = |what| {
            move |source| StateError::Read {
                vcpu: id,
                what,
                source,
            }
        };
        let tsc = TscReading::take(vcpu, id)?;
        let mp_state = vcpu.get_mp_state().map_err(failed("mp_state"))?.mp_state;
        let mp_state = MpState::from_kvm(mp_state).ok_or_else(|| StateError::Read {
            vcpu: id,
            what: "an mp_state that is known here",
            source: io::Error::other(format!("it is {mp_state}")),
        })?;
        let events = vcpu.get_vcpu_events().map_err(failed("events"))?;
        let regs = vcpu.get_regs().map_err(failed("registers"))?;
        let sregs = ioctl::get_sregs(vcpu, access.capabilities.sregs2)
            .map_err(failed_io("special registers"))?;
        let xcrs = vcpu
            .get_xcrs()
            .map_err(failed("extended control registers"))?;
        let xcrs = xcrs
            .xcrs
            .iter()
            .take(xcrs.nr_xcrs as usize)
            .map(|x| (x.xcr, x.value))
            .collect();
        let xsave =
            ioctl::get_xsave(vcpu, access.xsave_size).map_err(failed_io("the XSAVE area"))?;
        let debugregs = vcpu.get_debug_regs().map_err(failed("debug registers"))?;
        let msrs = read_msrs(vcpu, id, model_msrs)?;
        let lapic = vcpu
            .get_lapic()
            .map_err(failed("the local interrupt controller"))?;
        let state = Self {
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            debugregs,
            lapic: Box::new(lapic.regs.map(|byte| byte as u8)),
            tsc: tsc.counter.value,
            msrs,
            events,
        };
        Ok((state, tsc))
    }

    /// The first part of a restore: what comes before the TSC.
    pub(super) fn restore_registers(
        &self,
        vcpu: &VcpuFd,
        id: usize,
        model: &CpuModel,
        access: &Access,
    ) -> Result<(), StateError> {
        let refused = |field: &'static str| {
            move |error: kvm_ioctls::Error| StateError::refused(id, field, error.into())
        };
        let refused_io = |field| move |error| StateError::refused(id, field, error);
        // Ids are below 256, since an APIC has no more.
        model.set_features(vcpu, id as u8)?;
        let frequency = |error: kvm_ioctls::Error| StateError::Refused {
            path: "cpu_model.tsc_khz".to_owned(),
            source: error.into(),
        };
        if vcpu.get_tsc_khz().map_err(frequency)? != model.tsc_khz {
            vcpu.set_tsc_khz(model.tsc_khz).map_err(frequency)?;
        }
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state.to_kvm(),
        };
        vcpu.set_mp_state(mp_state).map_err(refused("mp_state"))?;
        ioctl::set_sregs(vcpu, &self.sregs, access.capabilities.sregs2)
            .map_err(refused_io("special_registers"))?;
        vcpu.set_regs(&self.regs).map_err(refused("registers"))?;
        vcpu.set_xcrs(&self.xcrs()).map_err(refused("xcrs"))?;
        ioctl::set_xsave(vcpu, &self.xsave, access.xsave_size).map_err(refused_io("xsave"))?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(refused("debug_registers"))?;
        let lapic = kvm_lapic_state {
            regs: self.lapic.map(|byte| byte as _),
        };
        vcpu.set_lapic(&lapic).map_err(refused("lapic"))
    }

    /// The last part of a restore: what comes after the TSC.
    pub(super) fn restore_msrs_and_events(
        &self,
        vcpu: &VcpuFd,
        id: usize,
        access: &Access,
    ) -> Result<(), StateError> {
        let (deadline, others): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .partition(|(index, _)| *index == msrs::IA32_TSC_DEADLINE);
        write_msrs(vcpu, id, &others)?;
        write_msrs(vcpu, id, &deadline)?;
        let mut events = self.events;
        // Nothing of these waits, or `check_host` had refused the state.
        if !access.capabilities.exception_payload {
            events.flags &= !KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if !access.capabilities.triple_fault_event {
            events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        vcpu.set_vcpu_events(&events)
            .map_err(|error| StateError::refused(id, "events", error.into()))
    }

    fn xcrs(&self) -> kvm_xcrs {
        let mut all = kvm_xcrs {
            nr_xcrs: self.xcrs.len() as u32,
            ..Default::default()
        };
        for (slot, (xcr, value)) in all.xcrs.iter_mut().zip(&self.xcrs) {
            *slot = kvm_xcr {
                xcr: *xcr,
                value: *value,
                reserved: 0,
            };
        }
        all
    }
}

/// What the registers of `indices` are, without those this vCPU does not have and those of which nothing need be kept.
fn read_msrs(vcpu: &VcpuFd, id: usize, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(MSRS_AT_ONCE));
        let entries: Vec<_> = now.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooManyMsrs)?;
        let done = vcpu.get_msrs(&mut msrs).map_err(|error| StateError::Read {
            vcpu: id,
            what: "model-specific registers",
            source: error.into(),
        })?;
        let values = msrs.as_slice().iter().take(done);
        read.extend(
            values
                .map(|e| (e.index, e.data))
                .filter(|(index, value)| *value != 0 || !msrs::is_omitted_if_zero(*index)),
        );
        // KVM stops at the first one it does not have.
        rest = match now.get(done..) {
            Some([missing, after @ ..]) => {
                tracing::debug!(vcpu = id, register = missing, "not readable");
                let left = after.len() + later.len();
                rest.get(rest.len() - left..).unwrap_or_default()
            }
            _ => later,
        };
    }
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, id: usize, values: &[(u32, u64)]) -> Result<(), StateError> {
    let mut rest = values;
    while !rest.is_empty() {
        let now = rest.get(..MSRS_AT_ONCE).unwrap_or(rest);
        let entries: Vec<_> = now.iter().map(|(i, v)| entry(*i, *v)).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooManyMsrs)?;
        let done = vcpu
            .set_msrs(&msrs)
            .map_err(|error| StateError::refused(id, "msrs", error.into()))?;
        if let Some((index, saved)) = now.get(done) {
            accept_refusal(vcpu, id, *index, *saved)?;
        }
        // KVM stops at the first one it does not take.
        rest = rest.get(now.len().min(done + 1)..).unwrap_or_default();
    }
    Ok(())
}

/// That KVM does not take a register does no harm if that is what it has anyway, or if nobody can see it and it was zero.
fn accept_refusal(vcpu: &VcpuFd, id: usize, index: u32, saved: u64) -> Result<(), StateError> {
    let here = read_msr(vcpu, index);
    if here.unwrap_or_default() == saved {
        return Ok(());
    }
    Err(StateError::Msr {
        vcpu: id,
        index,
        name: msrs::name(index),
        saved,
        here: here.map_or_else(
            || "this host does not have it".to_owned(),
            |value| format!("here it is {value:#x}"),
        ),
    })
}

pub(super) fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[entry(index, 0)]).ok()?;
    let read = vcpu.get_msrs(&mut msrs).ok()?;
    let entry = msrs.as_slice().first().filter(|_| read == 1)?;
    Some(entry.data)
}

pub(super) fn write_msr(
    vcpu: &VcpuFd,
    id: usize,
    index: u32,
    value: u64,
) -> Result<(), StateError> {
    write_msrs(vcpu, id, &[(index, value)])
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}
