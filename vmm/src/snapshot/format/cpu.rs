//! The processor a guest sees, and the state of its vCPUs.
//!
//! | module | what is in it |
//! |---|---|
//! | [`model`] | what all vCPUs have in common |
//! | [`vcpu`] | one vCPU |

pub mod model;
pub mod vcpu;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::{At, Invalid};
use super::hex::Hex;

pub use model::CpuModel;
pub use vcpu::Vcpu;

/// The most model-specific registers in one list.
const MAX_MSRS: usize = 1024;

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Its number.
    pub index: Hex<u32>,
    /// Its value.
    pub value: Hex<u64>,
}

impl Msr {
    fn of((index, value): (u32, u64)) -> Self {
        Self {
            index: Hex(index),
            value: Hex(value),
        }
    }
}

/// The numbers and values of a list whose numbers ascend, as far as `accepts` takes the numbers.
fn msrs(list: &[Msr], accepts: impl Fn(u32) -> bool) -> Result<Vec<(u32, u64)>, Invalid> {
    if list.len() > MAX_MSRS {
        let reason = format!("{} registers are more than {MAX_MSRS}", list.len());
        return Err(Invalid::new(reason));
    }
    for (place, pair) in list.windows(2).enumerate() {
        if let [before, after] = pair
            && before.index >= after.index
        {
            let reason = format!("{} follows {}; the list ascends", after.index, before.index);
            return Err(Invalid::new(reason)).entry(place + 1);
        }
    }
    list.iter()
        .map(|msr| {
            if accepts(msr.index.0) {
                Ok((msr.index.0, msr.value.0))
            } else {
                let path = format!("[{}]", msr.index);
                Err(Invalid::at(path, "is no register that is kept here"))
            }
        })
        .collect()
}
