//! The interrupt controllers that vCPUs share.

use kvm_bindings::{kvm_ioapic_state, kvm_pic_state};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::{At, Invalid};
use super::hex::Hex;
use super::version::Version;
use crate::kvm::state::IrqchipState;
use crate::kvm::state::irqchip::PINS;

/// Where KVM's I/O APIC is, and stays.
const IOAPIC_BASE: u64 = 0xfec0_0000;

/// Two 8259s and an I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Irqchip {
    /// Version of this section.
    pub version: Version<1>,
    /// The first 8259.
    pub master: Pic,
    /// The second 8259, behind the first.
    pub slave: Pic,
    /// I/O APIC.
    pub ioapic: Ioapic,
}

/// An 8259.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pic {
    /// Levels of the lines, for the detection of edges.
    pub last_irr: Hex<u8>,
    /// Interrupt request register.
    pub irr: Hex<u8>,
    /// Interrupt mask register.
    pub imr: Hex<u8>,
    /// In-service register.
    pub isr: Hex<u8>,
    /// Line of the highest priority, 0 to 7.
    pub priority_add: u8,
    /// Vector of the first line.
    pub irq_base: Hex<u8>,
    /// Reads give the in-service register.
    pub read_reg_select: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Initialisation word that is expected next, 0 to 3.
    pub init_state: u8,
    /// Interrupts end by themselves.
    pub auto_eoi: bool,
    /// Priorities rotate when interrupts end by themselves.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested_mode: bool,
    /// A fourth initialisation word is expected.
    pub init4: bool,
    /// Lines that are triggered by level.
    pub elcr: Hex<u8>,
    /// Lines that may be triggered by level.
    pub elcr_mask: Hex<u8>,
}

impl Pic {
    fn of(p: &kvm_pic_state) -> Self {
        Self {
            last_irr: Hex(p.last_irr),
            irr: Hex(p.irr),
            imr: Hex(p.imr),
            isr: Hex(p.isr),
            priority_add: p.priority_add,
            irq_base: Hex(p.irq_base),
            read_reg_select: p.read_reg_select != 0,
            poll: p.poll != 0,
            special_mask: p.special_mask != 0,
            init_state: p.init_state,
            auto_eoi: p.auto_eoi != 0,
            rotate_on_auto_eoi: p.rotate_on_auto_eoi != 0,
            special_fully_nested_mode: p.special_fully_nested_mode != 0,
            init4: p.init4 != 0,
            elcr: Hex(p.elcr),
            elcr_mask: Hex(p.elcr_mask),
        }
    }

    fn plain(&self) -> Result<kvm_pic_state, Invalid> {
        at_most(self.priority_add.into(), 7).field("priority_add")?;
        at_most(self.init_state.into(), 3).field("init_state")?;
        Ok(kvm_pic_state {
            last_irr: self.last_irr.0,
            irr: self.irr.0,
            imr: self.imr.0,
            isr: self.isr.0,
            priority_add: self.priority_add,
            irq_base: self.irq_base.0,
            read_reg_select: self.read_reg_select.into(),
            poll: self.poll.into(),
            special_mask: self.special_mask.into(),
            init_state: self.init_state,
            auto_eoi: self.auto_eoi.into(),
            rotate_on_auto_eoi: self.rotate_on_auto_eoi.into(),
            special_fully_nested_mode: self.special_fully_nested_mode.into(),
            init4: self.init4.into(),
            elcr: self.elcr.0,
            elcr_mask: self.elcr_mask.0,
        })
    }
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ioapic {
    /// Guest physical address.
    pub base_address: Hex<u64>,
    /// Register that the next access is to.
    pub ioregsel: u8,
    /// Its id, 0 to 15.
    pub id: u8,
    /// Pins whose interrupts wait.
    pub irr: Hex<u32>,
    /// Redirection table: one entry for each pin.
    pub redirections: [Hex<u64>; PINS],
}

impl Ioapic {
    fn plain(&self) -> Result<kvm_ioapic_state, Invalid> {
        if self.base_address.0 != IOAPIC_BASE {
            let reason = format!("{} is not {IOAPIC_BASE:#x}", self.base_address);
            return Err(Invalid::at("base_address", reason));
        }
        at_most(self.id.into(), 15).field("id")?;
        if self.irr.0 >> PINS != 0 {
            let reason = format!("{} has bits above those of {PINS} pins", self.irr);
            return Err(Invalid::at("irr", reason));
        }
        let mut state = kvm_ioapic_state {
            base_address: self.base_address.0,
            ioregsel: self.ioregsel.into(),
            id: self.id.into(),
            irr: self.irr.0,
            ..Default::default()
        };
        for (entry, saved) in state.redirtbl.iter_mut().zip(self.redirections) {
            entry.bits = saved.0;
        }
        Ok(state)
    }
}

impl Irqchip {
    /// The JSON of interrupt controllers in `state`.
    pub fn of(state: &IrqchipState) -> Self {
        Self {
            version: Version::default(),
            master: Pic::of(&state.master),
            slave: Pic::of(&state.slave),
            ioapic: Ioapic {
                base_address: Hex(state.ioapic.base_address),
                // Both are eight bits of a register.
                ioregsel: state.ioapic.ioregsel as u8,
                id: state.ioapic.id as u8,
                irr: Hex(state.ioapic.irr),
                redirections: state.redirections().map(Hex),
            },
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// What is in no interrupt controller.
    pub fn plain(&self) -> Result<IrqchipState, Invalid> {
        Ok(IrqchipState {
            master: self.master.plain().field("master")?,
            slave: self.slave.plain().field("slave")?,
            ioapic: self.ioapic.plain().field("ioapic")?,
        })
    }
}

/// Rejects a number above `most`.
fn at_most(number: u32, most: u32) -> Result<(), Invalid> {
    if number > most {
        return Err(Invalid::new(format!("{number} is more than {most}")));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Something of everything.
    pub fn sample() -> IrqchipState {
        let pic = |base| kvm_pic_state {
            irr: 1,
            imr: 0xfb,
            irq_base: base,
            priority_add: 7,
            init_state: 3,
            auto_eoi: 1,
            elcr_mask: 0xf8,
            ..Default::default()
        };
        let mut ioapic = kvm_ioapic_state {
            base_address: IOAPIC_BASE,
            ioregsel: 0x10,
            id: 3,
            irr: 1 << 23,
            ..Default::default()
        };
        for (pin, entry) in (0u64..).zip(&mut ioapic.redirtbl) {
            entry.bits = pin << 56 | (0x1_0030 + pin);
        }
        IrqchipState {
            master: pic(0x30),
            slave: pic(0x38),
            ioapic,
        }
    }

    #[test]
    fn controllers_are_the_same_after_json() {
        let json = Irqchip::of(&sample());
        let text = serde_json::to_string(&json).unwrap();
        let read: Irqchip = serde_json::from_str(&text).unwrap();
        assert_eq!(read, json);
        assert_eq!(read.plain(), Ok(sample()));
    }

    #[test]
    fn what_is_in_no_controller_is_refused_by_name() {
        let refusal = |change: &dyn Fn(&mut Irqchip)| {
            let mut json = Irqchip::of(&sample());
            change(&mut json);
            json.plain().unwrap_err().to_string()
        };
        for (text, expected) in [
            (
                refusal(&|c| c.master.priority_add = 8),
                "master.priority_add: 8 is more than 7",
            ),
            (
                refusal(&|c| c.slave.init_state = 4),
                "slave.init_state: 4 is more than 3",
            ),
            (
                refusal(&|c| c.ioapic.base_address = Hex(0)),
                "ioapic.base_address: 0x0 is not 0xfec00000",
            ),
            (
                refusal(&|c| c.ioapic.id = 16),
                "ioapic.id: 16 is more than 15",
            ),
            (
                refusal(&|c| c.ioapic.irr = Hex(1 << 24)),
                "ioapic.irr: 0x1000000 has bits above those of 24 pins",
            ),
        ] {
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn a_table_has_one_entry_for_each_pin() {
        let mut json = serde_json::to_value(Irqchip::of(&sample())).unwrap();
        let table = json["ioapic"]["redirections"].as_array_mut().unwrap();
        table.pop();
        assert!(serde_json::from_value::<Irqchip>(json).is_err());
    }
}
