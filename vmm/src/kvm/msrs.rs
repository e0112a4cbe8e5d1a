//! Which model-specific registers are state of a vCPU, and what they are called.

use std::ops::RangeInclusive;

/// Time stamp counter; it has a place of its own in the state.
pub const IA32_TSC: u32 = 0x10;
/// Deadline of the local interrupt controller's timer.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Vulnerabilities the processor does not have, and controls it has for others.
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// CPUID faulting.
pub const PLATFORM_INFO: u32 = 0xce;
/// AMD: LFENCE serializes.
pub const DE_CFG: u32 = 0xc001_1029;

/// Machine check banks. Zero in a vCPU that is new, and most stay so.
const MACHINE_CHECK: RangeInclusive<u32> = 0x400..=0x47f;

/// State that KVM keeps and does not name in its list, or not in all versions.
const ALSO: [RangeInclusive<u32>; 7] = [
    // IA32_DEBUGCTL
    0x1d9..=0x1d9,
    // MTRRs: variable, fixed, default type.
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
    // IA32_XSS
    0xda0..=0xda0,
];

/// State that does not exist in our guests, or that has another place.
const NOT: [RangeInclusive<u32>; 8] = [
    IA32_TSC..=IA32_TSC,
    // The old numbers of KVM's clock: other names of what is at 0x4b564d00.
    0x11..=0x12,
    // IA32_PERF_CAPABILITIES: PDCM is not shown.
    0x345..=0x345,
    // VMX capabilities, SVM: no nested virtualization.
    0x480..=0x491,
    0xc000_0104..=0xc000_0104,
    0xc001_0117..=0xc001_0117,
    // Hyper-V.
    0x4000_0000..=0x4000_01ff,
    // Not state but an order to KVM to write the time to guest memory: to repeat it would write where the guest, long
    // since, has something else. Linux gives it each time it wants to know.
    0x4b56_4d00..=0x4b56_4d00,
];

/// Performance counters.
const COUNTERS: [RangeInclusive<u32>; 11] = [
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30f,
    0x329..=0x329,
    0x38d..=0x390,
    0x3f1..=0x3f2,
    0x4c1..=0x4c8,
    0x600..=0x600,
    0xc000_0300..=0xc000_0303,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
];

fn is_in(ranges: &[RangeInclusive<u32>], index: u32) -> bool {
    ranges.iter().any(|range| range.contains(&index))
}

/// True for the registers of performance counters.
pub fn is_counter(index: u32) -> bool {
    is_in(&COUNTERS, index)
}

/// False for registers that have another place in a state, and for those that no guest has.
pub fn is_state(index: u32) -> bool {
    !is_in(&NOT, index)
}

/// True for registers that are left out of a state while they are zero.
pub fn is_omitted_if_zero(index: u32) -> bool {
    MACHINE_CHECK.contains(&index)
}

/// The registers that are state of a vCPU, of those KVM lists, in ascending order.
pub fn saved(listed: &[u32], counters: bool) -> Vec<u32> {
    let mut all: Vec<u32> = listed.to_vec();
    all.extend(ALSO.iter().cloned().flatten());
    all.extend(MACHINE_CHECK);
    all.retain(|index| is_state(*index) && (counters || !is_counter(*index)));
    all.sort_unstable();
    all.dedup();
    all
}

/// What a register is called, as far as it is one a person may meet in a message.
pub fn name(index: u32) -> &'static str {
    match index {
        0x10 => "IA32_TSC",
        0x1b => "IA32_APIC_BASE",
        0x3a => "IA32_FEATURE_CONTROL",
        0x3b => "IA32_TSC_ADJUST",
        0x48 => "IA32_SPEC_CTRL",
        0x8b => "IA32_UCODE_REV",
        0x9e => "IA32_SMBASE",
        0xce => "PLATFORM_INFO",
        0xe1 => "IA32_UMWAIT_CONTROL",
        0x10a => "IA32_ARCH_CAPABILITIES",
        0x122 => "IA32_TSX_CTRL",
        0x140 => "MISC_FEATURES_ENABLES",
        0x174 => "IA32_SYSENTER_CS",
        0x175 => "IA32_SYSENTER_ESP",
        0x176 => "IA32_SYSENTER_EIP",
        0x17a => "IA32_MCG_STATUS",
        0x17b => "IA32_MCG_CTL",
        0x1a0 => "IA32_MISC_ENABLE",
        0x1c4 => "IA32_XFD",
        0x1c5 => "IA32_XFD_ERR",
        0x1d9 => "IA32_DEBUGCTL",
        0x200..=0x20f | 0x250 | 0x258 | 0x259 | 0x268..=0x26f => "IA32_MTRR",
        0x277 => "IA32_PAT",
        0x2ff => "IA32_MTRR_DEF_TYPE",
        0x345 => "IA32_PERF_CAPABILITIES",
        0x400..=0x47f => "IA32_MC",
        0x4d0 => "IA32_MCG_EXT_CTL",
        0x6a0 => "IA32_U_CET",
        0x6a2 => "IA32_S_CET",
        0x6e0 => "IA32_TSC_DEADLINE",
        0xd90 => "IA32_BNDCFGS",
        0xda0 => "IA32_XSS",
        0x4b56_4d01 => "KVM_SYSTEM_TIME",
        0x4b56_4d02 => "KVM_ASYNC_PF_EN",
        0x4b56_4d03 => "KVM_STEAL_TIME",
        0x4b56_4d04 => "KVM_PV_EOI_EN",
        0x4b56_4d05 => "KVM_POLL_CONTROL",
        0x4b56_4d06 => "KVM_ASYNC_PF_INT",
        0x4b56_4d07 => "KVM_ASYNC_PF_ACK",
        0x4b56_4d08 => "KVM_MIGRATION_CONTROL",
        0xc000_0080 => "EFER",
        0xc000_0081 => "STAR",
        0xc000_0082 => "LSTAR",
        0xc000_0083 => "CSTAR",
        0xc000_0084 => "SFMASK",
        0xc000_0102 => "KERNEL_GS_BASE",
        0xc000_0103 => "TSC_AUX",
        0xc001_0015 => "HWCR",
        0xc001_011f => "VIRT_SPEC_CTRL",
        0xc001_1029 => "DE_CFG",
        _ if is_counter(index) => "a performance counter",
        _ => "a register without a name here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_kvms_with_what_it_leaves_out_and_without_what_has_another_place() {
        let listed = [
            0x4b56_4d00,
            0x12,
            0x174,
            0x10,
            0x4000_0000,
            0x200,
            0xc1,
            0x480,
        ];
        let saved = saved(&listed, false);
        for index in [0x174, 0x200, 0x2ff, 0x400, 0x47f, 0xda0] {
            assert!(saved.contains(&index), "{index:#x}");
        }
        for index in [0x4b56_4d00, 0x12, 0x10, 0x4000_0000, 0xc1, 0x480] {
            assert!(!saved.contains(&index), "{index:#x}");
        }
        assert!(saved.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn counters_that_cannot_be_taken_away_are_state() {
        assert!(saved(&[0xc001_0004], true).contains(&0xc001_0004));
        assert!(!saved(&[0xc001_0004], false).contains(&0xc001_0004));
    }
}
