//! Which processor the guest sees: what KVM supports, minus what we do not want, plus the topology.
//!
//! All vCPUs are cores of one package, one thread each. [`offered`] is what this host can show at most, [`shown`] what the
//! guest's processors have in common, and [`for_vcpu`] adds what tells them apart.
//!
//! | not shown | why |
//! |---|---|
//! | invariant TSC | the frequency may be another one after a restore; without it Linux keeps to kvm-clock, which says so |
//! | performance counters, debug store, processor trace, branch records | they count on the host's processor, and their state is not portable |
//! | nested virtualization, SGX, SEV, key locker | they have state outside of what a snapshot keeps |
//! | shadow stacks, indirect branch tracking | the shadow stack pointer is in no register class of KVM before Linux 6.18 |
//! | half of AMX | Linux 5.17 to 6.3 offers XTILE_CFG to processes that did not ask for XTILE_DATA |

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX_DTES64: u32 = 1 << 2;
const ECX_DS_CPL: u32 = 1 << 4;
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_DS: u32 = 1 << 21;
const EDX_HTT: u32 = 1 << 28;
/// Leaf 7.0.
const EBX_SGX: u32 = 1 << 2;
const EBX_PT: u32 = 1 << 25;
const ECX_SHSTK: u32 = 1 << 7;
const ECX_KEY_LOCKER: u32 = 1 << 23;
const ECX_SGX_LC: u32 = 1 << 30;
const EDX_SGX_KEYS: u32 = 1 << 1;
const EDX_ARCH_LBR: u32 = 1 << 19;
const EDX_IBT: u32 = 1 << 20;
/// AMX in leaf 7.0: BF16, TILE, INT8.
const EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// AMX in leaf 7.1: FP16.
const AMX_FP16: u32 = 1 << 21;
/// AMX in leaf 7.1: COMPLEX.
const AMX_COMPLEX: u32 = 1 << 8;
/// Leaf 7.1: supervisor shadow stacks.
const EDX_CET_SSS: u32 = 1 << 18;
/// Leaf 0x8000_0001.
const EXT_ECX_SVM: u32 = 1 << 2;
/// IBS, the core's, the northbridge's and the cache's counters.
const EXT_ECX_COUNTERS: u32 = 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 0x8000_0007.
const EDX_INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 6: a local APIC timer that never stops.
const EAX_ARAT: u32 = 1 << 2;

/// Leaf 0xd.1.
const XFD: u32 = 1 << 4;
/// XSAVE components of AMX: the configuration and the tiles.
const XTILE: u64 = 1 << 17 | 1 << 18;
/// XSAVE components of supervisor state that go with features not shown: processor trace, CET, branch records.
const HIDDEN_XSS: u32 = 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15;

/// What CPUID answers for one leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX of the question.
    pub function: u32,
    /// ECX of the question, if the answer depends on it.
    pub index: Option<u32>,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

impl Leaf {
    fn clear(&mut self) {
        (self.eax, self.ebx, self.ecx, self.edx) = (0, 0, 0, 0);
    }
}

impl From<kvm_cpuid_entry2> for Leaf {
    fn from(e: kvm_cpuid_entry2) -> Self {
        Self {
            function: e.function,
            index: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        }
    }
}

impl From<Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: Leaf) -> Self {
        Self {
            function: leaf.function,
            index: leaf.index.unwrap_or_default(),
            flags: leaf.index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        }
    }
}

/// The answer for `function` and `index`; an index that the answer does not depend on is not looked at.
pub fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<&Leaf> {
    leaves
        .iter()
        .find(|l| l.function == function && l.index.is_none_or(|i| i == index))
}

/// What this host can show to a guest at most: what KVM supports, less what is never shown.
///
/// A leaf that is taken away here makes snapshots of guests that saw it unrestorable.
pub fn offered(supported: &[Leaf], tsc_deadline: bool) -> Vec<Leaf> {
    let mut leaves: Vec<_> = supported
        .iter()
        // Those that are made here, or that describe parts of the host's topology.
        .filter(|l| !matches!(l.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    let amx = xcr0(supported) & XTILE == XTILE;
    for leaf in &mut leaves {
        restrict(leaf, tsc_deadline);
        if !amx {
            hide_amx(leaf);
        }
    }
    let components = xcr0(&leaves) | xss(&leaves);
    leaves.retain(|l| {
        let component = l.index.filter(|index| l.function == 0xd && *index >= 2);
        component.is_none_or(|index| index < 64 && components >> index & 1 != 0)
    });
    if !amx {
        shrink_xsave_area(&mut leaves);
    }
    leaves
}

fn restrict(leaf: &mut Leaf, tsc_deadline: bool) {
    match (leaf.function, leaf.index.unwrap_or(0)) {
        (0x1, _) => {
            leaf.ecx &= !(ECX_VMX | ECX_PDCM | ECX_DTES64 | ECX_DS_CPL);
            leaf.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            leaf.edx &= !EDX_DS;
            if tsc_deadline {
                leaf.ecx |= ECX_TSC_DEADLINE;
            }
        }
        (0x6, _) => {
            leaf.clear();
            leaf.eax = EAX_ARAT;
        }
        (0x7, 0) => {
            leaf.ebx &= !(EBX_SGX | EBX_PT);
            leaf.ecx &= !(ECX_SHSTK | ECX_KEY_LOCKER | ECX_SGX_LC);
            leaf.edx &= !(EDX_SGX_KEYS | EDX_ARCH_LBR | EDX_IBT);
        }
        (0x7, 1) => leaf.edx &= !EDX_CET_SSS,
        (0xd, 1) => leaf.ecx &= !HIDDEN_XSS,
        // Counters, SGX, processor trace, key locker, branch records; SVM, SEV, AMD's counters.
        (
            0xa | 0x12 | 0x14 | 0x19 | 0x1c | 0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0022,
            _,
        ) => {
            leaf.clear();
        }
        (0x8000_0001, _) => leaf.ecx &= !(EXT_ECX_SVM | EXT_ECX_COUNTERS),
        (0x8000_0007, _) => leaf.edx &= !EDX_INVARIANT_TSC,
        _ => {}
    }
}

fn hide_amx(leaf: &mut Leaf) {
    match (leaf.function, leaf.index.unwrap_or(0)) {
        (0x7, 0) => leaf.edx &= !EDX_AMX,
        (0x7, 1) => {
            leaf.eax &= !AMX_FP16;
            leaf.edx &= !AMX_COMPLEX;
        }
        (0xd, 0) => leaf.eax &= !(XTILE as u32),
        // Extended feature disable is for the tiles alone.
        (0xd, 1) => leaf.eax &= !XFD,
        (0x1d | 0x1e, _) => leaf.clear(),
        _ => {}
    }
}

/// Makes the size of the XSAVE area that of the components which are left.
fn shrink_xsave_area(leaves: &mut [Leaf]) {
    /// Legacy area and header.
    const FIRST: u32 = 576;
    let user = xcr0(leaves);
    let size = leaves
        .iter()
        .filter(|l| l.function == 0xd)
        .filter(|l| {
            l.index
                .is_some_and(|i| (2..64).contains(&i) && user >> i & 1 != 0)
        })
        .map(|l| l.eax.saturating_add(l.ebx))
        .fold(FIRST, u32::max);
    for leaf in leaves {
        if leaf.function == 0xd && leaf.index == Some(0) {
            leaf.ecx = leaf.ecx.min(size);
            leaf.ebx = leaf.ebx.min(size);
        }
    }
}

/// Bits that number the processors of a package of `cpus`.
fn id_bits(cpus: u8) -> u32 {
    u32::from(cpus.max(1)).next_power_of_two().trailing_zeros()
}

/// What all `cpus` vCPUs of a guest show, of what the host offers. The ids are those of the first.
pub fn shown(offered: &[Leaf], cpus: u8) -> Vec<Leaf> {
    let mut leaves = offered.to_vec();
    for leaf in &mut leaves {
        count_processors(leaf, cpus);
    }
    // Leaf 0xb answers for extended topology whether or not the host's processor has it: Linux wants it for x2APIC.
    leaves.extend(topology(cpus));
    if let Some(first) = leaves.iter_mut().find(|l| l.function == 0) {
        first.eax = first.eax.max(0xb);
    }
    leaves
}

fn count_processors(leaf: &mut Leaf, cpus: u8) {
    let count = u32::from(cpus.max(1));
    match leaf.function {
        0x1 => {
            let logical = 1 << id_bits(cpus);
            // Cache line of 64 bytes in the flush field, as the host has it, stays.
            leaf.ebx = leaf.ebx & 0xff00 | logical.min(0xff) << 16;
            if count > 1 {
                leaf.edx |= EDX_HTT;
            } else {
                leaf.edx &= !EDX_HTT;
            }
        }
        // Deterministic cache parameters: Intel's leaf, and AMD's in the same format.
        0x4 | 0x8000_001d => {
            let level = leaf.eax >> 5 & 7;
            let sharing = if level >= 3 { count } else { 1 };
            leaf.eax &= !(0xfff << 14);
            leaf.eax |= (sharing - 1) << 14;
            if leaf.function == 4 && leaf.eax & 0x1f != 0 {
                leaf.eax &= !(0x3f << 26);
                leaf.eax |= (count - 1).min(0x3f) << 26;
            }
        }
        0x8000_0008 => leaf.ecx = id_bits(cpus) << 12 | (count - 1),
        0x8000_001e => {
            leaf.eax = 0;
            leaf.ebx = 0;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

fn topology(cpus: u8) -> [Leaf; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let leaf = |index: u32, shift: u32, count: u32, kind: u32| Leaf {
        function: 0xb,
        index: Some(index),
        eax: shift,
        ebx: count,
        ecx: index | kind,
        edx: 0,
    };
    [
        leaf(0, 0, 1, THREADS),
        leaf(1, id_bits(cpus), u32::from(cpus), CORES),
        leaf(2, 0, 0, 0),
    ]
}

/// What the vCPU of this local APIC id shows: the leaves all have, with its own ids.
pub fn for_vcpu(shown: &[Leaf], apic_id: u8) -> Vec<kvm_cpuid_entry2> {
    let id = u32::from(apic_id);
    let with_id = |leaf: &Leaf| {
        let mut leaf = *leaf;
        match leaf.function {
            0x1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
            0xb => leaf.edx = id,
            0x8000_001e => (leaf.eax, leaf.ebx) = (id, id),
            _ => {}
        }
        leaf.into()
    };
    shown.iter().map(with_id).collect()
}

/// Number of physical address bits, from leaf `0x8000_0008`; 36 if the leaf is missing.
pub fn physical_address_bits(leaves: &[Leaf]) -> u32 {
    find(leaves, 0x8000_0008, 0).map_or(36, |l| l.eax & 0xff)
}

/// Number of linear address bits, from leaf `0x8000_0008`; 48 if the leaf is missing.
pub fn linear_address_bits(leaves: &[Leaf]) -> u32 {
    find(leaves, 0x8000_0008, 0).map_or(48, |l| l.eax >> 8 & 0xff)
}

/// The user components of XSAVE: what XCR0 may have.
pub fn xcr0(leaves: &[Leaf]) -> u64 {
    find(leaves, 0xd, 0).map_or(0, |l| u64::from(l.edx) << 32 | u64::from(l.eax))
}

/// The supervisor components of XSAVE: what IA32_XSS may have.
pub fn xss(leaves: &[Leaf]) -> u64 {
    find(leaves, 0xd, 1).map_or(0, |l| u64::from(l.edx) << 32 | u64::from(l.ecx))
}

/// The twelve letters of the processor's vendor, such as `GenuineIntel`.
pub fn vendor(leaves: &[Leaf]) -> String {
    let Some(first) = find(leaves, 0, 0) else {
        return String::new();
    };
    let bytes = [first.ebx, first.edx, first.ecx].map(u32::to_le_bytes);
    String::from_utf8_lossy(bytes.as_flattened()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> Leaf {
        Leaf {
            function,
            index: None,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
        }
    }

    fn indexed(function: u32, index: u32) -> Leaf {
        Leaf {
            index: Some(index),
            ..leaf(function)
        }
    }

    fn entry(function: u32, apic_id: u8, cpus: u8) -> kvm_cpuid_entry2 {
        let shown = shown(&offered(&[leaf(function)], true), cpus);
        *for_vcpu(&shown, apic_id)
            .iter()
            .find(|e| e.function == function)
            .unwrap()
    }

    #[test]
    fn every_processor_has_its_own_id() {
        assert_eq!(entry(1, 3, 4).ebx >> 24, 3);
        assert_eq!(entry(0x8000_001e, 3, 4).eax, 3);
        let all = for_vcpu(&shown(&[], 4), 3);
        assert!(all.iter().all(|e| e.function == 0xb && e.edx == 3));
    }

    #[test]
    fn processors_differ_in_their_ids_alone() {
        let all = shown(
            &offered(&[leaf(0), leaf(1), leaf(4), leaf(0x8000_001e)], true),
            4,
        );
        let differing = std::iter::zip(for_vcpu(&all, 0), for_vcpu(&all, 2))
            .filter(|(a, b)| a != b)
            .map(|(a, _)| a.function);
        assert!(differing.eq([1, 0x8000_001e, 0xb, 0xb, 0xb]));
        let first: Vec<_> = for_vcpu(&all, 0).into_iter().map(Leaf::from).collect();
        assert_eq!(first, all);
    }

    #[test]
    fn what_a_snapshot_cannot_keep_is_hidden() {
        assert_eq!(entry(1, 0, 1).ecx & (ECX_VMX | ECX_PDCM | ECX_DTES64), 0);
        assert_eq!(entry(1, 0, 1).edx & EDX_DS, 0);
        assert_eq!(
            entry(0x8000_0001, 0, 1).ecx & (EXT_ECX_SVM | EXT_ECX_COUNTERS),
            0
        );
        assert_eq!(entry(0x8000_0007, 0, 1).edx & EDX_INVARIANT_TSC, 0);
        for function in [0xa, 0x12, 0x14, 0x1c, 0x8000_000a, 0x8000_001f] {
            assert_eq!(entry(function, 0, 1).eax, 0, "{function:#x}");
        }
    }

    /// KVM itself keeps the sizes in leaf 0xd in step with what the guest enables, and takes them from the host for that.
    #[test]
    fn the_leaves_of_extended_state_are_passed_as_they_are() {
        let supported = [0, 2, 9].map(|index| indexed(0xd, index));
        let mut shown = shown(&offered(&supported, true), 2);
        shown.retain(|l| l.function == 0xd);
        assert_eq!(shown, supported);
    }

    #[test]
    fn without_the_tiles_nothing_of_amx_is_shown() {
        let component = |index, offset, size| Leaf {
            eax: size,
            ebx: offset,
            ecx: 0,
            ..indexed(0xd, index)
        };
        let supported = [
            indexed(7, 0),
            indexed(7, 1),
            Leaf {
                eax: 0x202e7,
                ebx: 11008,
                ecx: 11008,
                edx: 0,
                ..indexed(0xd, 0)
            },
            component(2, 576, 256),
            component(9, 2688, 8),
            component(17, 2752, 64),
            indexed(0x1d, 1),
            indexed(0x1e, 0),
        ];
        let shown = offered(&supported, true);
        let of = |function, index| *find(&shown, function, index).unwrap();
        assert_eq!(xcr0(&shown), 0x2e7);
        assert_eq!((of(0xd, 0).ebx, of(0xd, 0).ecx), (2696, 2696));
        assert!(find(&shown, 0xd, 17).is_none());
        assert_eq!(of(7, 0).edx & EDX_AMX, 0);
        assert_eq!(of(7, 1).eax & AMX_FP16, 0);
        assert_eq!(of(7, 1).edx & AMX_COMPLEX, 0);
        assert_eq!((of(0x1d, 1).eax, of(0x1e, 0).ebx), (0, 0));

        let mut whole = supported.to_vec();
        whole[2].eax = 0x602e7;
        whole.push(component(18, 2816, 8192));
        let shown = offered(&whole, true);
        assert_eq!(xcr0(&shown), 0x602e7);
        assert_eq!(find(&shown, 7, 0).unwrap().edx & EDX_AMX, EDX_AMX);
        assert_eq!(find(&shown, 0x1d, 1), Some(&whole[6]));
    }

    #[test]
    fn components_of_hidden_features_go_with_them() {
        let supported = [
            indexed(0xd, 0),
            indexed(0xd, 1),
            indexed(0xd, 9),
            indexed(0xd, 11),
        ];
        let mut supported = supported;
        supported[0].edx = 0;
        supported[0].eax = 0x207;
        supported[1].ecx = 1 << 11 | 1 << 12;
        supported[1].edx = 0;
        let shown = offered(&supported, true);
        assert_eq!(xss(&shown), 0);
        assert!(find(&shown, 0xd, 9).is_some());
        assert!(find(&shown, 0xd, 11).is_none());
    }

    #[test]
    fn the_topology_counts_cores_of_one_package() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (254, 8)] {
            let core = topology(cpus)[1];
            assert_eq!((core.eax, core.ebx), (bits, u32::from(cpus)), "{cpus}");
        }
    }

    #[test]
    fn host_topology_leaves_are_replaced() {
        let supported = [leaf(0xb), leaf(0x1f), leaf(0x8000_0026), leaf(0)];
        let shown: Vec<_> = shown(&offered(&supported, true), 2)
            .iter()
            .map(|l| l.function)
            .collect();
        assert_eq!(shown, [0, 0xb, 0xb, 0xb]);
    }

    #[test]
    fn address_bits_and_vendor_come_from_their_leaves() {
        let mut entry = leaf(0x8000_0008);
        entry.eax = 0x3028;
        assert_eq!(physical_address_bits(&[entry]), 40);
        assert_eq!(linear_address_bits(&[entry]), 48);
        assert_eq!(physical_address_bits(&[]), 36);
        let first = Leaf {
            ebx: u32::from_le_bytes(*b"Genu"),
            edx: u32::from_le_bytes(*b"ineI"),
            ecx: u32::from_le_bytes(*b"ntel"),
            ..Leaf::default()
        };
        assert_eq!(vendor(&[first]), "GenuineIntel");
    }
}
