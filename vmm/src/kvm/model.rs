//! The processor a guest was promised, and whether a host can keep the promise.
//!
//! [`HostCpu`] is what a host has to give. [`CpuModel`] is what one guest got of it, which stays the same for its life: a
//! restored guest shows the leaves it was saved with, never those computed anew.
//!
//! | module | what it does |
//! |---|---|
//! | [`compare`] | lists everything a guest relies on and a host lacks |
//! | [`features`] | the registers of CPUID whose bits are features, and their names |

pub mod compare;
pub mod features;

use std::collections::BTreeMap;
use std::ffi::c_ulong;

use kvm_bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SREGS2, KVM_CAP_X86_SMM,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, Msrs,
    kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::cpuid::{self, Leaf};
use super::speed::Trial;
use super::{KvmError, failed, msrs};

pub use compare::Mismatch;

/// Size of the XSAVE area every KVM has.
pub const XSAVE_SIZE: u32 = 4096;

/// What KVM has on this host beyond [`super::REQUIRED`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Page directory pointers are part of the special registers.
    pub sregs2: bool,
    /// Exceptions that wait are told apart from injected ones, with their payload.
    pub exception_payload: bool,
    /// A triple fault that waits can be read and written.
    pub triple_fault_event: bool,
    /// System management mode.
    pub smm: bool,
    /// Performance counters can be taken away from a VM.
    pub pmu_disable: bool,
    /// Guests can have another TSC frequency than the host.
    pub tsc_scaling: bool,
}

impl Capabilities {
    /// Of the KVM that runs `vm`.
    pub fn of(vm: &VmFd) -> Self {
        let value = |cap: u32| vm.check_extension_raw(c_ulong::from(cap));
        let has_bit = |cap: u32, bit: u32| value(cap) as u32 & bit != 0;
        Self {
            sregs2: value(KVM_CAP_SREGS2) > 0,
            exception_payload: value(KVM_CAP_EXCEPTION_PAYLOAD) > 0,
            triple_fault_event: value(KVM_CAP_X86_TRIPLE_FAULT_EVENT) > 0,
            smm: value(KVM_CAP_X86_SMM) > 0,
            pmu_disable: has_bit(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE),
            tsc_scaling: vm.check_extension(Cap::TscControl),
        }
    }
}

/// What a host has to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    /// What CPUID can show at most.
    pub leaves: Vec<Leaf>,
    /// Values of registers that are features, as far as there are such.
    pub feature_msrs: BTreeMap<u32, u64>,
    /// Numbers of the registers KVM lists as state.
    pub msrs: Vec<u32>,
    /// Bytes of the XSAVE area.
    pub xsave_size: u32,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// What KVM has.
    pub capabilities: Capabilities,
}

impl HostCpu {
    /// Asks KVM, with a VM that is thrown away. Takes KVM a long time: once is enough for all vCPUs.
    pub fn examine(kvm: &Kvm) -> Result<Self, KvmError> {
        Self::of(kvm, &Trial::new(kvm)?)
    }

    /// As [`Self::examine`], with a VM that is there for other reasons.
    pub fn of(kvm: &Kvm, trial: &Trial) -> Result<Self, KvmError> {
        let supported: Vec<Leaf> = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("ask which processor features it supports"))?
            .as_slice()
            .iter()
            .map(|entry| Leaf::from(*entry))
            .collect();
        let msrs = kvm
            .get_msr_index_list()
            .map_err(failed("ask which model-specific registers are state"))?;
        let xsave_size = trial.vm().check_extension_int(Cap::Xsave2);
        let tsc_khz = trial
            .vcpu()
            .get_tsc_khz()
            .map_err(failed("ask for the frequency of the time stamp counter"))?;
        Ok(Self {
            leaves: cpuid::offered(&supported, kvm.check_extension(Cap::TscDeadlineTimer)),
            feature_msrs: feature_msrs(kvm),
            msrs: msrs.as_slice().to_vec(),
            xsave_size: u32::try_from(xsave_size).map_or(XSAVE_SIZE, |n| n.max(XSAVE_SIZE)),
            tsc_khz,
            capabilities: Capabilities::of(trial.vm()),
        })
    }

    /// Numbers of the registers that are state of a guest with `model` on this host.
    pub fn saved_msrs(&self, model: &CpuModel) -> Vec<u32> {
        msrs::saved(&self.msrs, model.performance_counters)
    }

    /// Number of physical address bits.
    pub fn physical_address_bits(&self) -> u32 {
        cpuid::physical_address_bits(&self.leaves)
    }
}

/// Those that [`compare`] looks at; one that this host does not have is left out.
fn feature_msrs(kvm: &Kvm) -> BTreeMap<u32, u64> {
    let value = |index: u32| {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        let read = kvm.get_msrs(&mut msrs).ok()?;
        let entry = msrs.as_slice().first().filter(|_| read == 1)?;
        Some((index, entry.data))
    };
    compare::FEATURE_MSRS
        .iter()
        .filter_map(|m| value(m.index))
        .collect()
}

/// The processor of one guest. All its vCPUs have the same but for their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// What CPUID shows; the ids are those of vCPU 0.
    pub leaves: Vec<Leaf>,
    /// Values of registers that are features.
    pub feature_msrs: BTreeMap<u32, u64>,
    /// Bytes of the XSAVE area.
    pub xsave_size: u32,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// The guest may find performance counters: the host it was started on could not take them away.
    pub performance_counters: bool,
}

impl CpuModel {
    /// The model of a new guest with `cpus` vCPUs: everything the host offers.
    pub fn new(host: &HostCpu, cpus: u8) -> Self {
        let listed = host.msrs.iter().any(|index| msrs::is_counter(*index));
        let performance_counters = listed && !host.capabilities.pmu_disable;
        Self {
            leaves: cpuid::shown(&host.leaves, cpus),
            feature_msrs: host.feature_msrs.clone(),
            xsave_size: host.xsave_size,
            tsc_khz: host.tsc_khz,
            performance_counters,
        }
    }

    /// The processor's vendor.
    pub fn vendor(&self) -> String {
        cpuid::vendor(&self.leaves)
    }

    /// What XCR0 may have.
    pub fn xcr0(&self) -> u64 {
        cpuid::xcr0(&self.leaves)
    }

    /// Prepares a VM for vCPUs of this model. To be called before there is any.
    pub fn prepare_vm(&self, vm: &VmFd) -> Result<(), KvmError> {
        let has = Capabilities::of(vm);
        let counters = u64::from(KVM_PMU_CAP_DISABLE);
        for (wanted, cap, argument, what) in [
            (
                has.pmu_disable && !self.performance_counters,
                KVM_CAP_PMU_CAPABILITY,
                counters,
                "take the performance counters away",
            ),
            (
                has.exception_payload,
                KVM_CAP_EXCEPTION_PAYLOAD,
                1,
                "have exceptions with their payload",
            ),
            (
                has.triple_fault_event,
                KVM_CAP_X86_TRIPLE_FAULT_EVENT,
                1,
                "have triple faults as events",
            ),
        ] {
            if wanted {
                let mut request = kvm_enable_cap {
                    cap,
                    ..Default::default()
                };
                request.args[0] = argument;
                vm.enable_cap(&request).map_err(failed(what))?;
            }
        }
        Ok(())
    }

    /// Gives a vCPU its features: the first thing that is done to it, since KVM takes no others once it has run.
    pub fn set_features(&self, vcpu: &VcpuFd, apic_id: u8) -> Result<(), KvmError> {
        let entries = cpuid::for_vcpu(&self.leaves, apic_id);
        let entries = CpuId::from_entries(&entries)
            .map_err(|_| KvmError::Capability("room for the processor's feature leaves"))?;
        vcpu.set_cpuid2(&entries)
            .map_err(failed("set the processor features"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_guest_fits_its_own_host() {
        let Ok(kvm) = crate::kvm::open() else {
            println!("skipped: no KVM here");
            return;
        };
        let host = HostCpu::examine(&kvm).unwrap();
        let model = CpuModel::new(&host, 4);
        assert_eq!(model.check_host(&host), []);
        assert_eq!(model.vendor().len(), 12);
        assert_ne!(model.xcr0() & 3, 0);
        assert!(host.tsc_khz > 0);
        assert!(!host.saved_msrs(&model).is_empty());
    }

    #[test]
    fn kvm_takes_the_model_and_shows_it_with_the_ids() {
        let Ok(kvm) = crate::kvm::open() else {
            println!("skipped: no KVM here");
            return;
        };
        let model = CpuModel::new(&HostCpu::examine(&kvm).unwrap(), 4);
        let vm = kvm.create_vm().unwrap();
        model.prepare_vm(&vm).unwrap();
        vm.create_irq_chip().unwrap();
        for id in [0, 3] {
            let vcpu = vm.create_vcpu(id).unwrap();
            model.set_features(&vcpu, id as u8).unwrap();
            let shown = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
            let first = shown.as_slice().iter().find(|e| e.function == 1).unwrap();
            assert_eq!(u64::from(first.ebx >> 24), id);
        }
    }
}
