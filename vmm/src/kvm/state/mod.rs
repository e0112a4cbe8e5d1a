//! The state KVM keeps of a VM: its vCPUs, interrupt controllers and clock.
//!
//! | module | what it does |
//! |---|---|
//! | [`clock`] | KVM's clock and the time stamp counters |
//! | [`irqchip`] | the interrupt controllers that vCPUs share |
//! | [`vcpu`] | one vCPU |
//!
//! All of it is read while the vCPUs are parked and the devices at rest. Interrupt controllers come before vCPUs: an
//! interrupt goes from the former to the latter, and one that is seen in both is one interrupt, while one seen in neither
//! is lost.

pub mod clock;
pub mod irqchip;
pub mod vcpu;

mod ioctl;

#[cfg(test)]
mod tests;

use std::io;

use kvm_bindings::{KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_TRIPLE_FAULT};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

pub use clock::{ClockChoice, ClockState};
pub use irqchip::IrqchipState;
pub use vcpu::{MpState, VcpuState};

use super::model::{Capabilities, CpuModel, HostCpu, Mismatch, XSAVE_SIZE};
use super::{KvmError, msrs};
use crate::vcpu::{Control, ControlError};
use vcpu::Access;

/// Why a state could not be saved or restored. Paths are those of `state.json`.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The vCPUs are not at rest.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The features of a vCPU.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM did not give something of a vCPU.
    #[error("KVM does not tell {what} of vCPU {vcpu}: {source}")]
    Read {
        /// Which vCPU.
        vcpu: usize,
        /// What.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// KVM did not give something of the VM.
    #[error("KVM does not tell {what}: {source}")]
    ReadVm {
        /// What.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// KVM does not take something.
    #[error("{path}: KVM refuses what is saved there: {source}")]
    Refused {
        /// Where it is in the state.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// KVM does not take a model-specific register.
    #[error(
        "vcpus[{vcpu}].msrs[{index:#x}] ({name}): KVM does not take the value {saved:#x}; {here}"
    )]
    Msr {
        /// Which vCPU.
        vcpu: usize,
        /// The register's number.
        index: u32,
        /// Its name.
        name: &'static str,
        /// What was to be set.
        saved: u64,
        /// What there is instead.
        here: String,
    },
    /// More registers than KVM takes.
    #[error("there is no memory for model-specific registers")]
    TooManyMsrs,
    /// Another number of vCPUs.
    #[error("vcpus: the snapshot has {saved}, the machine {here}")]
    Vcpus {
        /// In the state.
        saved: usize,
        /// Here.
        here: usize,
    },
}

impl StateError {
    fn refused(vcpu: usize, field: &'static str, source: io::Error) -> Self {
        Self::Refused {
            path: format!("vcpus[{vcpu}].{field}"),
            source,
        }
    }
}

/// Everything KVM keeps of a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Interrupt controllers.
    pub irqchip: IrqchipState,
    /// Clock.
    pub clock: ClockState,
    /// vCPUs, in the order of their ids.
    pub vcpus: Vec<VcpuState>,
}

fn access(vm: &VmFd) -> Access {
    let size = u32::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(XSAVE_SIZE);
    Access {
        capabilities: Capabilities::of(vm),
        xsave_size: size.max(XSAVE_SIZE),
    }
}

/// Reads the state of a paused machine of this model whose vCPUs have threads. `msrs` are the registers that are state
/// ([`HostCpu::saved_msrs`]).
///
/// KVM writes to guest memory when a vCPU's descriptor is used: the last look for dirty pages comes after this.
pub fn save(
    vm: &VmFd,
    control: &Control,
    model: &CpuModel,
    msrs: &[u32],
) -> Result<State, StateError> {
    let access = access(vm);
    let indices = msrs.to_vec();
    save_with(vm, model.tsc_khz, || {
        let read = control.on_all(move |id, vcpu| VcpuState::save(vcpu, id, &indices, &access))?;
        read.into_iter().collect()
    })
}

/// As [`save`], of vCPUs that have no thread.
pub fn save_directly(
    vm: &VmFd,
    vcpus: &[VcpuFd],
    model: &CpuModel,
    msrs: &[u32],
) -> Result<State, StateError> {
    let access = access(vm);
    save_with(vm, model.tsc_khz, || {
        let all = vcpus.iter().enumerate();
        all.map(|(id, vcpu)| VcpuState::save(vcpu, id, msrs, &access))
            .collect()
    })
}

fn save_with(
    vm: &VmFd,
    tsc_khz: u32,
    vcpus: impl FnOnce() -> Result<Vec<(VcpuState, vcpu::TscReading)>, StateError>,
) -> Result<State, StateError> {
    let irqchip = IrqchipState::save(vm)?;
    let clock = ClockState::save(vm)?;
    let (mut vcpus, readings): (Vec<_>, Vec<_>) = vcpus()?.into_iter().unzip();
    clock::align(&mut vcpus, &readings, clock.at, tsc_khz);
    Ok(State {
        irqchip,
        clock: clock.value,
        vcpus,
    })
}

/// Puts a state into a VM whose vCPUs have not run and have no thread yet; the guest's memory is there already.
///
/// The vCPUs get the features of `model`, which must be that of the saved guest and fit the host
/// ([`CpuModel::check_host`], [`State::check_host`]). Nothing may be assumed about a VM for which this failed.
pub fn restore(
    vm: &VmFd,
    vcpus: &[VcpuFd],
    model: &CpuModel,
    state: &State,
    choice: ClockChoice,
) -> Result<(), StateError> {
    if vcpus.len() != state.vcpus.len() {
        return Err(StateError::Vcpus {
            saved: state.vcpus.len(),
            here: vcpus.len(),
        });
    }
    let access = access(vm);
    let all = || vcpus.iter().zip(&state.vcpus).enumerate();
    state.irqchip.restore(vm)?;
    for (id, (vcpu, saved)) in all() {
        saved.restore_registers(vcpu, id, model, &access)?;
    }
    let elapsed = state.clock.restore(vm, choice)?;
    clock::restore_tsc(vcpus, &state.vcpus, elapsed, model.tsc_khz)?;
    for (id, (vcpu, saved)) in all() {
        saved.restore_msrs_and_events(vcpu, id, &access)?;
    }
    if vm.check_extension(Cap::KvmclockCtrl) {
        for (id, (vcpu, _)) in all() {
            tell_pause(vcpu, id);
        }
    }
    Ok(())
}

/// Has KVM mark the guest's clock, so that the guest's watchdog does not take a pause for a processor that hangs. The
/// guest sees it at its next entry.
pub fn tell_pause(vcpu: &VcpuFd, id: usize) {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => {}
        // The guest does not use that clock, or not yet.
        Err(error) if error.errno() == libc::EINVAL => {}
        Err(error) => tracing::warn!(%error, vcpu = id, "the guest is not told of the pause"),
    }
}

impl State {
    /// Everything of the state that `host` cannot take, beyond what the model says.
    pub fn check_host(&self, host: &HostCpu) -> Vec<Mismatch> {
        let mut found = Vec::new();
        let has = &host.capabilities;
        let known = msrs::saved(&host.msrs, true);
        let mut named = Vec::new();
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let events = &vcpu.events;
            let flagged = |flag| events.flags & flag != 0;
            let exception = flagged(KVM_VCPUEVENT_VALID_PAYLOAD)
                && (events.exception.pending != 0 || events.exception_has_payload != 0);
            let triple_fault =
                flagged(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && events.triple_fault.pending != 0;
            for (needed, there, what, capability) in [
                (
                    exception,
                    has.exception_payload,
                    "exception",
                    "KVM_CAP_EXCEPTION_PAYLOAD",
                ),
                (
                    triple_fault,
                    has.triple_fault_event,
                    "triple_fault",
                    "KVM_CAP_X86_TRIPLE_FAULT_EVENT",
                ),
                (events.smi.smm != 0, has.smm, "smi", "KVM_CAP_X86_SMM"),
            ] {
                if needed && !there {
                    found.push(Mismatch::new(
                        format!("vcpus[{id}].events.{what}"),
                        "one under way",
                        format_args!("does not have {capability}"),
                    ));
                }
            }
            for (index, value) in &vcpu.msrs {
                let missing = *value != 0 && known.binary_search(index).is_err();
                // Once for all vCPUs.
                if missing && !named.contains(index) {
                    named.push(*index);
                    found.push(Mismatch::new(
                        format!("vcpus[{id}].msrs[{index:#x}] ({})", msrs::name(*index)),
                        format_args!("{value:#x}"),
                        "does not keep that register",
                    ));
                }
            }
        }
        found
    }
}
