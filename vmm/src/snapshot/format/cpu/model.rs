//! What all vCPUs have in common.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::{At, Invalid};
use super::super::hex::Hex;
use super::super::version::Version;
use super::{Msr, msrs};
use crate::kvm::cpuid;
use crate::kvm::model::{self as kvm, XSAVE_SIZE};

/// The most answers of CPUID that KVM takes.
const MAX_LEAVES: usize = 256;
/// The largest XSAVE area. Processors with AMX have 11 KiB.
const MAX_XSAVE: u32 = 64 << 10;

/// The processor a guest was promised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuModel {
    /// Version of this section.
    pub version: Version<1>,
    /// What CPUID answers. The ids in it are those of the first vCPU.
    pub cpuid: Vec<Leaf>,
    /// Model-specific registers whose bits are features, ascending.
    pub feature_msrs: Vec<Msr>,
    /// Bytes of the XSAVE area.
    pub xsave_size: u32,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// The guest may use performance counters, because the host on which it was started could not take them away.
    pub performance_counters: bool,
}

/// An answer of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    /// EAX of the question.
    pub leaf: Hex<u32>,
    /// ECX of the question, if the answer depends on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subleaf: Option<Hex<u32>>,
    /// EAX.
    pub eax: Hex<u32>,
    /// EBX.
    pub ebx: Hex<u32>,
    /// ECX.
    pub ecx: Hex<u32>,
    /// EDX.
    pub edx: Hex<u32>,
}

impl From<&cpuid::Leaf> for Leaf {
    fn from(l: &cpuid::Leaf) -> Self {
        Self {
            leaf: Hex(l.function),
            subleaf: l.index.map(Hex),
            eax: Hex(l.eax),
            ebx: Hex(l.ebx),
            ecx: Hex(l.ecx),
            edx: Hex(l.edx),
        }
    }
}

impl From<&Leaf> for cpuid::Leaf {
    fn from(l: &Leaf) -> Self {
        Self {
            function: l.leaf.0,
            index: l.subleaf.map(|index| index.0),
            eax: l.eax.0,
            ebx: l.ebx.0,
            ecx: l.ecx.0,
            edx: l.edx.0,
        }
    }
}

impl CpuModel {
    /// The JSON of a model.
    pub fn of(model: &kvm::CpuModel) -> Self {
        let feature_msrs = model.feature_msrs.iter();
        Self {
            version: Version::default(),
            cpuid: model.leaves.iter().map(Leaf::from).collect(),
            feature_msrs: feature_msrs.map(|(i, v)| Msr::of((*i, *v))).collect(),
            xsave_size: model.xsave_size,
            tsc_khz: model.tsc_khz,
            performance_counters: model.performance_counters,
        }
    }

    /// The model.
    ///
    /// # Errors
    ///
    /// What is in no processor.
    pub fn plain(&self) -> Result<kvm::CpuModel, Invalid> {
        self.leaves().field("cpuid")?;
        let feature_msrs = msrs(&self.feature_msrs, |_| true).field("feature_msrs")?;
        if !(XSAVE_SIZE..=MAX_XSAVE).contains(&self.xsave_size)
            || !self.xsave_size.is_multiple_of(4)
        {
            let size = self.xsave_size;
            let reason = format!("{size} is no multiple of 4 between {XSAVE_SIZE} and {MAX_XSAVE}");
            return Err(Invalid::at("xsave_size", reason));
        }
        if self.tsc_khz == 0 {
            return Err(Invalid::at("tsc_khz", "0 is no frequency"));
        }
        Ok(kvm::CpuModel {
            leaves: self.cpuid.iter().map(cpuid::Leaf::from).collect(),
            feature_msrs: feature_msrs.into_iter().collect(),
            xsave_size: self.xsave_size,
            tsc_khz: self.tsc_khz,
            performance_counters: self.performance_counters,
        })
    }

    fn leaves(&self) -> Result<(), Invalid> {
        if self.cpuid.len() > MAX_LEAVES {
            let reason = format!("{} answers are more than {MAX_LEAVES}", self.cpuid.len());
            return Err(Invalid::new(reason));
        }
        let mut seen = BTreeSet::new();
        let mut plain = BTreeSet::new();
        for (place, l) in self.cpuid.iter().enumerate() {
            let again = match l.subleaf {
                Some(subleaf) => plain.contains(&l.leaf) || !seen.insert((l.leaf, Some(subleaf))),
                None => !plain.insert(l.leaf) || seen.iter().any(|(leaf, _)| *leaf == l.leaf),
            };
            if again {
                let reason = format!("leaf {} is answered twice", l.leaf);
                return Err(Invalid::new(reason)).entry(place);
            }
        }
        for leaf in [0, 1] {
            if !plain.contains(&Hex(leaf)) {
                return Err(Invalid::new(format!("leaf {leaf:#x} is missing")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(in super::super) mod tests {
    use super::*;

    /// Something of everything.
    pub fn sample() -> kvm::CpuModel {
        let leaf = |function, index| cpuid::Leaf {
            function,
            index,
            eax: 0x8000_0001,
            ebx: 2,
            ecx: 3,
            edx: u32::MAX,
        };
        kvm::CpuModel {
            leaves: vec![
                leaf(0, None),
                leaf(1, None),
                leaf(7, Some(0)),
                leaf(7, Some(1)),
            ],
            feature_msrs: [(0xce, 1 << 31), (0x10a, 0x2b)].into(),
            xsave_size: 4096,
            tsc_khz: 2_596_142,
            performance_counters: false,
        }
    }

    #[test]
    fn a_model_is_the_same_after_json() {
        let json = CpuModel::of(&sample());
        let text = serde_json::to_string(&json).unwrap();
        let read: CpuModel = serde_json::from_str(&text).unwrap();
        assert_eq!(read, json);
        assert_eq!(read.plain(), Ok(sample()));
    }

    fn refusal(change: impl FnOnce(&mut CpuModel)) -> String {
        let mut json = CpuModel::of(&sample());
        change(&mut json);
        json.plain().unwrap_err().to_string()
    }

    #[test]
    fn what_is_in_no_processor_is_refused_by_name() {
        for (text, expected) in [
            (
                refusal(|m| m.cpuid[3] = m.cpuid[2]),
                "cpuid[3]: leaf 0x7 is answered twice",
            ),
            (
                refusal(|m| m.cpuid[2].subleaf = None),
                "cpuid[3]: leaf 0x7 is answered twice",
            ),
            (
                refusal(|m| m.cpuid[3].subleaf = None),
                "cpuid[3]: leaf 0x7 is answered twice",
            ),
            (
                refusal(|m| m.cpuid[1].leaf = Hex(2)),
                "cpuid: leaf 0x1 is missing",
            ),
            (
                refusal(|m| m.cpuid = vec![m.cpuid[0]; 257]),
                "cpuid: 257 answers are more than 256",
            ),
            (
                refusal(|m| m.feature_msrs.swap(0, 1)),
                "feature_msrs[1]: 0xce follows 0x10a; the list ascends",
            ),
            (
                refusal(|m| m.xsave_size = 0xffff_fffc),
                "xsave_size: 4294967292 is no multiple of 4 between 4096 and 65536",
            ),
            (
                refusal(|m| m.xsave_size = 4097),
                "xsave_size: 4097 is no multiple of 4 between 4096 and 65536",
            ),
            (refusal(|m| m.tsc_khz = 0), "tsc_khz: 0 is no frequency"),
        ] {
            assert_eq!(text, expected);
        }
    }
}
