//! Which processor the guest sees: what KVM supports, minus what we do not want, plus the topology.
//!
//! All vCPUs are cores of one package, one thread each.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EXT_ECX_SVM: u32 = 1 << 2;
const EXT_ECX_PERF_COUNTERS: u32 = 1 << 23 | 1 << 24;
/// Leaf 6: a local APIC timer that never stops.
const EAX_ARAT: u32 = 1 << 2;

/// What the entries are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// This processor's local APIC id.
    pub apic_id: u8,
    /// Number of processors.
    pub cpus: u8,
    /// KVM emulates the TSC deadline mode of the local APIC timer.
    pub tsc_deadline: bool,
}

impl Request {
    /// Bits that number the processors of the package.
    fn id_bits(self) -> u32 {
        u32::from(self.cpus.max(1))
            .next_power_of_two()
            .trailing_zeros()
    }
}

/// Turns what KVM supports into what one vCPU shows.
pub fn entries(supported: &[kvm_cpuid_entry2], request: Request) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|e| !is_hidden(e.function))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, request);
    }
    // Leaf 0xb answers for extended topology whether or not the host's processor has it: Linux wants it for x2APIC.
    entries.extend(topology(request));
    if let Some(first) = entries.iter_mut().find(|e| e.function == 0) {
        first.eax = first.eax.max(0xb);
    }
    entries
}

/// Leaves that are made here, or that describe parts of the host's topology.
fn is_hidden(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

fn adjust(entry: &mut kvm_cpuid_entry2, request: Request) {
    let id = u32::from(request.apic_id);
    let cpus = u32::from(request.cpus.max(1));
    match entry.function {
        0x1 => {
            let logical = 1 << request.id_bits();
            // Cache line of 64 bytes in the flush field, as the host has it, stays.
            entry.ebx = entry.ebx & 0xff00 | id << 24 | logical.min(0xff) << 16;
            entry.ecx &= !ECX_VMX;
            entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            if request.tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            if cpus > 1 {
                entry.edx |= EDX_HTT;
            } else {
                entry.edx &= !EDX_HTT;
            }
        }
        // Deterministic cache parameters: Intel's leaf, and AMD's in the same format.
        0x4 | 0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cpus } else { 1 };
            entry.eax &= !(0xfff << 14);
            entry.eax |= (sharing - 1) << 14;
            if entry.function == 4 && entry.eax & 0x1f != 0 {
                entry.eax &= !(0x3f << 26);
                entry.eax |= (cpus - 1).min(0x3f) << 26;
            }
        }
        0x6 => {
            entry.eax = EAX_ARAT;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        // No performance counters.
        0xa | 0x8000_0022 => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0x8000_0001 => entry.ecx &= !(EXT_ECX_SVM | EXT_ECX_PERF_COUNTERS),
        // Nested virtualization on AMD: its feature leaf goes with the feature.
        0x8000_000a => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0x8000_0008 => entry.ecx = request.id_bits() << 12 | (cpus - 1),
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn topology(request: Request) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let leaf = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind,
        edx: u32::from(request.apic_id),
        ..Default::default()
    };
    [
        leaf(0, 0, 1, THREADS),
        leaf(1, request.id_bits(), u32::from(request.cpus), CORES),
        leaf(2, 0, 0, 0),
    ]
}

/// Number of physical address bits, from leaf `0x8000_0008`; 36 if the leaf is missing.
pub fn physical_address_bits(supported: &[kvm_cpuid_entry2]) -> u32 {
    supported
        .iter()
        .find(|e| e.function == 0x8000_0008)
        .map_or(36, |e| e.eax & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn request(apic_id: u8, cpus: u8) -> Request {
        Request {
            apic_id,
            cpus,
            tsc_deadline: true,
        }
    }

    fn shown(function: u32, request: Request) -> kvm_cpuid_entry2 {
        let supported = [leaf(function)];
        *entries(&supported, request)
            .iter()
            .find(|e| e.function == function)
            .unwrap()
    }

    #[test]
    fn every_processor_has_its_own_id() {
        assert_eq!(shown(1, request(3, 4)).ebx >> 24, 3);
        assert_eq!(shown(0x8000_001e, request(3, 4)).eax, 3);
        let all = entries(&[], request(3, 4));
        assert!(all.iter().all(|e| e.function == 0xb && e.edx == 3));
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        assert_eq!(shown(1, request(0, 1)).ecx & ECX_VMX, 0);
        assert_eq!(shown(0x8000_0001, request(0, 1)).ecx & EXT_ECX_SVM, 0);
        assert_eq!(shown(0xa, request(0, 1)).eax, 0);
    }

    /// KVM itself keeps the sizes in leaf 0xd in step with what the guest enables, and takes them from the host for that.
    #[test]
    fn the_leaves_of_extended_state_are_passed_as_they_are() {
        let supported = [0, 1, 2, 9].map(|index| kvm_cpuid_entry2 {
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..leaf(0xd)
        });
        let mut shown = entries(&supported, request(1, 2));
        shown.retain(|entry| entry.function == 0xd);
        assert_eq!(shown, supported);
    }

    #[test]
    fn the_topology_counts_cores_of_one_package() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (254, 8)] {
            let core = topology(request(0, cpus))[1];
            assert_eq!((core.eax, core.ebx), (bits, u32::from(cpus)), "{cpus}");
        }
    }

    #[test]
    fn host_topology_leaves_are_replaced() {
        let supported = [leaf(0xb), leaf(0x1f), leaf(0x8000_0026), leaf(0)];
        let shown: Vec<_> = entries(&supported, request(0, 2))
            .iter()
            .map(|e| e.function)
            .collect();
        assert_eq!(shown, [0, 0xb, 0xb, 0xb]);
    }

    #[test]
    fn address_bits_come_from_their_leaf() {
        let mut entry = leaf(0x8000_0008);
        entry.eax = 0x3028;
        assert_eq!(physical_address_bits(&[entry]), 40);
        assert_eq!(physical_address_bits(&[]), 36);
    }
}
