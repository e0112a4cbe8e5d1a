//! Everything a guest relies on and a host lacks, all at once.

use std::fmt;

use super::features::{COMPONENTS, REGISTERS, names};
use super::{CpuModel, HostCpu};
use crate::kvm::cpuid::{self, Leaf};
use crate::kvm::msrs;

/// How far two TSC frequencies may be apart without scaling: what KVM tolerates by default.
const TSC_TOLERANCE_PPM: u64 = 250;

/// One thing a guest relies on that a host does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What it is.
    pub what: String,
    /// What the guest was saved with.
    pub saved: String,
    /// What the host has.
    pub host: String,
}

impl Mismatch {
    /// The two values of `what`.
    pub fn new(what: impl Into<String>, saved: impl fmt::Display, host: impl fmt::Display) -> Self {
        Self {
            what: what.into(),
            saved: saved.to_string(),
            host: host.to_string(),
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: the snapshot has {}, this host {}",
            self.what, self.saved, self.host
        )
    }
}

/// A model-specific register whose bits are features.
#[derive(Debug)]
pub(super) struct FeatureMsr {
    pub(super) index: u32,
    /// The bits that a guest relies on.
    features: u64,
    /// Names of the bits from bit 0 on.
    names: &'static str,
}

/// All that are compared. Others are fixed by CPUID, or belong to features that are not shown.
pub(super) static FEATURE_MSRS: [FeatureMsr; 3] = [
    FeatureMsr {
        index: msrs::IA32_ARCH_CAPABILITIES,
        // All but RSBA and RRSBA, which say that a processor *is* vulnerable.
        features: !(1 << 2 | 1 << 19),
        names: "rdcl_no ibrs_all rsba skip_l1dfl_vmentry ssb_no mds_no pschange_mc_no tsx_ctrl taa_no - misc_package_ctls \
                energy_filtering_ctl doitm sbdr_ssdp_no fbsdp_no psdp_no - fb_clear fb_clear_ctrl rrsba bhi_no \
                xapic_disable_status - - pbrsb_no - gds_no rfds_no rfds_clear",
    },
    FeatureMsr {
        index: msrs::PLATFORM_INFO,
        features: 1 << 31,
        names: "- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - cpuid_fault",
    },
    FeatureMsr {
        index: msrs::DE_CFG,
        features: 1 << 1,
        names: "- lfence_serialize",
    },
];

impl CpuModel {
    /// Everything the guest relies on that `host` lacks; nothing if the guest can run there.
    pub fn check_host(&self, host: &HostCpu) -> Vec<Mismatch> {
        let mut found = Vec::new();
        self.check_vendor(host, &mut found);
        self.check_features(host, &mut found);
        self.check_address_bits(host, &mut found);
        self.check_xsave(host, &mut found);
        self.check_values(host, &mut found);
        self.check_feature_msrs(host, &mut found);
        self.check_tsc(host, &mut found);
        found
    }

    fn check_vendor(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        let (saved, here) = (self.vendor(), cpuid::vendor(&host.leaves));
        if saved != here {
            found.push(Mismatch::new(
                "vendor of the processor",
                saved.escape_debug(),
                here.escape_debug(),
            ));
        }
    }

    fn check_features(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        for register in &REGISTERS {
            let value = |leaves: &[Leaf]| {
                cpuid::find(leaves, register.function, register.index).map_or(0, register.value)
            };
            let (saved, here) = (value(&self.leaves), value(&host.leaves));
            let missing = saved & !here & !register.ignored;
            if missing != 0 {
                let what = format!(
                    "features {} of the processor (CPUID {:#x}.{} {})",
                    register.names(missing),
                    register.function,
                    register.index,
                    register.name
                );
                found.push(Mismatch::new(what, hex(saved), hex(here)));
            }
        }
    }

    fn check_address_bits(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        for (what, bits) in [
            (
                "physical address bits (CPUID 0x80000008 EAX)",
                cpuid::physical_address_bits as fn(&[Leaf]) -> u32,
            ),
            (
                "linear address bits (CPUID 0x80000008 EAX)",
                cpuid::linear_address_bits,
            ),
        ] {
            let (saved, here) = (bits(&self.leaves), bits(&host.leaves));
            if saved > here {
                found.push(Mismatch::new(what, saved, here));
            }
        }
    }

    /// The area is kept in the standard format, so what the guest uses must be where it was.
    fn check_xsave(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        if self.xsave_size > host.xsave_size {
            found.push(Mismatch::new(
                "size of the XSAVE area",
                self.xsave_size,
                host.xsave_size,
            ));
        }
        let both = self.xcr0() & cpuid::xcr0(&host.leaves);
        for index in (2..63).filter(|index| both >> index & 1 != 0) {
            let place = |leaves: &[Leaf]| {
                let leaf = cpuid::find(leaves, 0xd, index)?;
                Some((leaf.ebx, leaf.eax))
            };
            let (Some(saved), Some(here)) = (place(&self.leaves), place(&host.leaves)) else {
                continue;
            };
            if saved != here {
                let show = |(offset, size)| format!("{size} bytes at {offset}");
                let name = names(COMPONENTS, 1 << index);
                let what = format!("XSAVE component {name} (CPUID 0xd.{index} EBX, EAX)");
                found.push(Mismatch::new(what, show(saved), show(here)));
            }
        }
    }

    /// Leaves that describe a feature by numbers.
    fn check_values(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        for (function, index, what) in [
            (0x1d, 1, "tiles of AMX (CPUID 0x1d.1)"),
            (0x1e, 0, "tile multiplication of AMX (CPUID 0x1e.0)"),
        ] {
            let value = |leaves: &[Leaf]| {
                cpuid::find(leaves, function, index).map_or([0; 3], |l| [l.eax, l.ebx, l.ecx])
            };
            let (saved, here) = (value(&self.leaves), value(&host.leaves));
            if saved != [0; 3] && saved != here {
                let show = |value: [u32; 3]| value.map(hex).join(" ");
                found.push(Mismatch::new(what, show(saved), show(here)));
            }
        }
        let version = |leaves: &[Leaf]| cpuid::find(leaves, 0x24, 0).map_or(0, |l| l.ebx & 0xff);
        let (saved, here) = (version(&self.leaves), version(&host.leaves));
        if saved > here {
            found.push(Mismatch::new(
                "version of AVX10 (CPUID 0x24.0 EBX)",
                saved,
                here,
            ));
        }
    }

    fn check_feature_msrs(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        for msr in &FEATURE_MSRS {
            let value = |of: &std::collections::BTreeMap<u32, u64>| {
                of.get(&msr.index).copied().unwrap_or_default()
            };
            let (saved, here) = (value(&self.feature_msrs), value(&host.feature_msrs));
            let missing = saved & !here & msr.features;
            if missing != 0 {
                let what = format!(
                    "features {} of the processor (MSR {:#x}, {})",
                    names(msr.names, missing),
                    msr.index,
                    msrs::name(msr.index)
                );
                found.push(Mismatch::new(
                    what,
                    format_args!("{saved:#x}"),
                    format_args!("{here:#x}"),
                ));
            }
        }
    }

    fn check_tsc(&self, host: &HostCpu, found: &mut Vec<Mismatch>) {
        let (saved, here) = (u64::from(self.tsc_khz), u64::from(host.tsc_khz));
        let tolerance = here * TSC_TOLERANCE_PPM / 1_000_000;
        if !host.capabilities.tsc_scaling && saved.abs_diff(here) > tolerance {
            found.push(Mismatch::new(
                "frequency of the time stamp counter",
                format_args!("{saved} kHz"),
                format_args!("{here} kHz, and its processor cannot scale it"),
            ));
        }
    }
}

fn hex(value: u32) -> String {
    format!("{value:#x}")
}

#[cfg(test)]
mod tests {
    use super::super::Capabilities;
    use super::*;

    fn host() -> HostCpu {
        let leaf = |function, index, eax, ebx, ecx, edx| Leaf {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
        };
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        HostCpu {
            leaves: vec![
                leaf(0, None, 0xd, word(b"Genu"), word(b"ntel"), word(b"ineI")),
                leaf(1, None, 0x906ea, 0x800, 0x8120_0001, 0x0789_fbff),
                leaf(7, Some(0), 1, 1 << 16 | 1 << 5, 0, 1 << 29),
                leaf(0xd, Some(0), 0xe7, 2696, 2696, 0),
                leaf(0xd, Some(2), 256, 576, 0, 0),
                leaf(0xd, Some(5), 64, 1088, 0, 0),
                leaf(0x8000_0008, None, 0x3028, 0, 0, 0),
            ],
            feature_msrs: [(msrs::IA32_ARCH_CAPABILITIES, 0x2b)].into(),
            msrs: vec![0x174],
            xsave_size: 4096,
            tsc_khz: 2_000_000,
            capabilities: Capabilities::default(),
        }
    }

    fn differing(change: impl FnOnce(&mut HostCpu)) -> Vec<String> {
        let model = CpuModel::new(&host(), 2);
        let mut other = host();
        change(&mut other);
        let found = model.check_host(&other);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_same_host_has_everything() {
        assert_eq!(differing(|_| ()), [""; 0]);
    }

    #[test]
    fn a_host_that_has_more_does_too() {
        let found = differing(|host| {
            host.leaves[1].ecx |= 1 << 28;
            host.leaves[2].ebx |= 1 << 31;
            host.leaves[6].eax = 0x3934;
            host.xsave_size = 11008;
            host.feature_msrs
                .insert(msrs::IA32_ARCH_CAPABILITIES, 0xffff);
        });
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn everything_that_is_missing_is_listed_at_once() {
        let found = differing(|host| {
            host.leaves[0].ebx = u32::from_le_bytes(*b"Auth");
            host.leaves[1].ecx &= !(1 << 24);
            host.leaves[2].ebx = 0;
            host.leaves[3].eax = 7;
            host.leaves[4].ebx = 832;
            host.leaves[6].eax = 0x3024;
            host.feature_msrs.clear();
            host.tsc_khz = 2_001_000;
        });
        let expected = [
            "vendor of the processor: the snapshot has GenuineIntel, this host AuthineIntel",
            "features tsc_deadline_timer of the processor (CPUID 0x1.0 ECX): the snapshot has 0x81200001, this host 0x80200001",
            "features avx2, avx512f of the processor (CPUID 0x7.0 EBX): the snapshot has 0x10020, this host 0x0",
            "features opmask, zmm_hi256, hi16_zmm of the processor (CPUID 0xd.0 EAX): the snapshot has 0xe7, this host 0x7",
            "physical address bits (CPUID 0x80000008 EAX): the snapshot has 40, this host 36",
            "XSAVE component avx (CPUID 0xd.2 EBX, EAX): the snapshot has 256 bytes at 576, this host 256 bytes at 832",
            "features rdcl_no, ibrs_all, skip_l1dfl_vmentry, mds_no of the processor (MSR 0x10a, IA32_ARCH_CAPABILITIES): \
             the snapshot has 0x2b, this host 0x0",
            "frequency of the time stamp counter: the snapshot has 2000000 kHz, this host 2001000 kHz, and its processor \
             cannot scale it",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_frequency_may_differ_a_little_or_be_scaled() {
        for (khz, scaling, fits) in [
            (2_000_400, false, true),
            (1_999_600, false, true),
            (2_000_600, false, false),
            (1_999_400, false, false),
            (3_000_000, true, true),
        ] {
            let found = differing(|host| {
                host.tsc_khz = khz;
                host.capabilities.tsc_scaling = scaling;
            });
            assert_eq!(found.is_empty(), fits, "{khz} {scaling}: {found:?}");
        }
    }

    #[test]
    fn features_that_say_a_processor_is_vulnerable_need_not_be_there() {
        let mut model = CpuModel::new(&host(), 2);
        model
            .feature_msrs
            .insert(msrs::IA32_ARCH_CAPABILITIES, 0x2b | 1 << 2 | 1 << 19);
        assert_eq!(model.check_host(&host()), []);
    }

    #[test]
    fn an_area_that_is_too_large_is_refused() {
        let mut model = CpuModel::new(&host(), 2);
        model.xsave_size = 11008;
        let found = model.check_host(&host());
        assert_eq!(
            found,
            [Mismatch::new("size of the XSAVE area", 11008, 4096)]
        );
    }
}
