//! The registers of CPUID whose bits are features, and what these are called.

use crate::kvm::cpuid::Leaf;

/// One register of features: a guest may have no bit there that its host lacks.
#[derive(Debug)]
pub struct Register {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
    /// Which register.
    pub name: &'static str,
    /// Its value in a leaf.
    pub value: fn(&Leaf) -> u32,
    /// Bits that KVM sets and clears while the guest runs, or that count instead of promising.
    pub ignored: u32,
    /// Names of the bits from bit 0 on, as in `/proc/cpuinfo` where it has them; `-` where there is none.
    names: &'static str,
}

impl Register {
    /// The names of the bits that are set in `bits`.
    pub fn names(&self, bits: u32) -> String {
        names(self.names, bits.into())
    }
}

/// The names of the bits set in `bits`, of a list with one word for each from bit 0 on.
pub(super) fn names(list: &str, bits: u64) -> String {
    let mut all = list.split_ascii_whitespace();
    let named: Vec<_> = (0..64)
        .map(|bit| (bit, all.next().filter(|name| *name != "-")))
        .filter(|(bit, _)| bits >> bit & 1 != 0)
        .map(|(bit, name)| name.map_or_else(|| format!("bit {bit}"), str::to_owned))
        .collect();
    named.join(", ")
}

const fn register(
    function: u32,
    index: u32,
    name: &'static str,
    value: fn(&Leaf) -> u32,
    ignored: u32,
    names: &'static str,
) -> Register {
    Register {
        function,
        index,
        name,
        value,
        ignored,
        names,
    }
}

const EAX: fn(&Leaf) -> u32 = |l| l.eax;
const EBX: fn(&Leaf) -> u32 = |l| l.ebx;
const ECX: fn(&Leaf) -> u32 = |l| l.ecx;
const EDX: fn(&Leaf) -> u32 = |l| l.edx;

const OSXSAVE: u32 = 1 << 27;
const APIC_AND_HTT: u32 = 1 << 9 | 1 << 28;
const OSPKE: u32 = 1 << 4;

/// Names of the XSAVE components.
pub(super) const COMPONENTS: &str = "x87 sse avx bndregs bndcsr opmask zmm_hi256 hi16_zmm pt pkru pasid cet_u cet_s hdc \
    uintr lbr hwp xtile_cfg xtile_data apx";

/// All of them.
pub static REGISTERS: [Register; 20] = [
    register(
        0x1,
        0,
        "ECX",
        ECX,
        OSXSAVE,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cnxt_id sdbg fma \
        cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand \
        hypervisor",
    ),
    register(
        0x1,
        0,
        "EDX",
        EDX,
        APIC_AND_HTT,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 \
        pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    register(
        0x7,
        0,
        "EBX",
        EBX,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
        zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf \
        avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    register(
        0x7,
        0,
        "ECX",
        ECX,
        OSPKE,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes \
        vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 mawau mawau mawau mawau mawau rdpid \
        keylocker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    register(
        0x7,
        0,
        "EDX",
        EDX,
        0,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl \
        md_clear rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
        avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
        spec_ctrl_ssbd",
    ),
    register(
        0x7,
        1,
        "EAX",
        EAX,
        0,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd archperfmonext - fzrm fsrs \
        fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - invd_disable movrs",
    ),
    register(0x7, 1, "EBX", EBX, 0, "ppin pbndkb"),
    register(
        0x7,
        1,
        "EDX",
        EDX,
        0,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr \
        prefetchiti user_msr - uiret_uif cet_sss avx10 - apx_f - mwait",
    ),
    register(
        0x7,
        2,
        "EDX",
        EDX,
        0,
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_disable",
    ),
    register(0xd, 0, "EAX", EAX, 0, COMPONENTS),
    register(0xd, 0, "EDX", EDX, 0, ""),
    register(0xd, 1, "EAX", EAX, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    register(0xd, 1, "ECX", ECX, 0, COMPONENTS),
    register(
        0x4000_0001,
        0,
        "EAX",
        EAX,
        0,
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time \
        kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield \
        kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable",
    ),
    register(
        0x8000_0001,
        0,
        "ECX",
        ECX,
        0,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch \
        osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc \
        perfctr_llc mwaitx",
    ),
    register(
        0x8000_0001,
        0,
        "EDX",
        EDX,
        1 << 9,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat \
        pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    register(
        0x8000_0007,
        0,
        "EDX",
        EDX,
        0,
        "ts fid vid ttp tm stc 100mhzsteps hwpstate invariant_tsc cpb eff_freq_ro",
    ),
    register(
        0x8000_0008,
        0,
        "EBX",
        EBX,
        0,
        "clzero irperf xsaveerptr invlpgb rdpru - mba - - wbnoinvd - - ibpb - ibrs stibp \
        ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc \
        amd_psfd btc_no ibpb_ret brs",
    ),
    register(
        0x8000_0021,
        0,
        "EAX",
        EAX,
        0,
        "no_nested_data_bp wrmsr_base_ns lfence_rdtsc smm_pgcfg_lock - - \
        null_sel_clr_base upper_address_ignore autoibrs no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl_msr - - - \
        cpuid_user_dis epsf - prefetchi - - - eraps - - sbpb ibpb_brtype srso_no srso_user_kernel_no srso_msr_fix",
    ),
    register(0x8000_0021, 0, "ECX", ECX, 0, "- tsa_sq_no tsa_l1_no"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_their_names() {
        let named = |function, index, name: &str, bits| {
            let register = REGISTERS
                .iter()
                .find(|r| (r.function, r.index, r.name) == (function, index, name));
            register.unwrap().names(bits)
        };
        for (function, index, name, bit, expected) in [
            (0x1, 0, "ECX", 24, "tsc_deadline_timer"),
            (0x1, 0, "ECX", 31, "hypervisor"),
            (0x1, 0, "EDX", 26, "sse2"),
            (0x7, 0, "EBX", 31, "avx512vl"),
            (0x7, 0, "ECX", 22, "rdpid"),
            (0x7, 0, "ECX", 31, "pks"),
            (0x7, 0, "EDX", 24, "amx_tile"),
            (0x7, 0, "EDX", 29, "arch_capabilities"),
            (0x7, 1, "EAX", 21, "amx_fp16"),
            (0x7, 1, "EAX", 26, "lam"),
            (0x7, 1, "EDX", 19, "avx10"),
            (0xd, 0, "EAX", 18, "xtile_data"),
            (0x4000_0001, 0, "EAX", 24, "kvmclock_stable"),
            (0x8000_0001, 0, "ECX", 22, "topoext"),
            (0x8000_0001, 0, "EDX", 29, "lm"),
            (0x8000_0008, 0, "EBX", 12, "ibpb"),
            (0x8000_0008, 0, "EBX", 31, "brs"),
            (0x8000_0021, 0, "EAX", 27, "sbpb"),
            (0x8000_0021, 0, "EAX", 31, "srso_msr_fix"),
        ] {
            assert_eq!(named(function, index, name, 1 << bit), expected);
        }
        assert_eq!(named(0x1, 0, "ECX", 1 << 16 | 1), "sse3, bit 16");
    }
}
