//! Whatever is written to the SR-IOV registers, and whatever resets come in between: the VFs that answer are those the
//! registers say.

use proptest::prelude::*;

use super::*;

/// TotalVFs.
const TOTAL: u8 = 6;

#[derive(Clone, Debug)]
enum Step {
    /// Any write within a dword of the SR-IOV capability.
    Write(u16, Vec<u8>),
    /// NumVFs, then VF Enable and VF MSE.
    Enable(u64),
    Control(u64),
    Flr(u8),
    BusReset,
    /// Device status 0.
    VirtioReset(u8),
    Master(u8),
    Start(u8),
    Request(u8),
    Complete(u8),
    /// Any write to the BAR of a VF that may not be there.
    Bar(u64, u64),
}

fn write() -> impl Strategy<Value = Step> {
    let byte = prop_oneof![any::<u8>(), 0u8..0x1a, Just(0), Just(0xff)];
    (0u16..0x40, prop::collection::vec(byte, 1..5)).prop_map(|(at, mut data)| {
        data.truncate(4 - usize::from(at % 4));
        Step::Write(at, data)
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => write(),
        4 => (0u64..9).prop_map(Step::Enable),
        2 => (0u64..0x20).prop_map(Step::Control),
        1 => (0..=TOTAL).prop_map(Step::Flr),
        1 => Just(Step::BusReset),
        2 => (0..=TOTAL).prop_map(Step::VirtioReset),
        2 => (1..=TOTAL + 1).prop_map(Step::Master),
        3 => (0..=TOTAL).prop_map(Step::Start),
        2 => (0..=TOTAL).prop_map(Step::Request),
        2 => (0..=TOTAL).prop_map(Step::Complete),
        1 => (0u64..0x40_0000, any::<u64>()).prop_map(|(at, value)| Step::Bar(at, value)),
    ]
}

impl Rig {
    fn take(&self, step: &Step) {
        let there = |devfn: u8| self.owner.at(DevFn(devfn)).is_some();
        match step {
            Step::Write(at, data) => {
                let target = self.owner.at(DevFn(0)).unwrap();
                let _ = target.config_write(SRIOV + at, data);
            }
            Step::Enable(vfs) => self.enable(*vfs),
            Step::Control(value) => {
                let _ = self.set_config::<2>(0, CONTROL, *value);
            }
            Step::Flr(devfn) if there(*devfn) => {
                let _ = self.flr(*devfn);
            }
            Step::BusReset => self.pf.reset(),
            Step::VirtioReset(devfn) => {
                let _ = self.put::<1>(*devfn, 20, 0);
            }
            Step::Master(devfn) => self.master(*devfn),
            Step::Start(devfn) if there(*devfn) => self.start(*devfn),
            Step::Flr(_) | Step::Start(_) => {}
            Step::Request(devfn) => self.request(*devfn),
            Step::Complete(devfn) => {
                self.complete(*devfn);
            }
            Step::Bar(at, value) => {
                let _ = self.pf.memory_write(MEMBERS, *at, &value.to_le_bytes());
            }
        }
    }

    /// Compares everything that depends on which VFs exist with what a driver reads from the capability.
    fn check(&self) -> Result<(), TestCaseError> {
        let control = self.config::<2>(0, CONTROL);
        let num_vfs = self.config::<2>(0, NUM_VFS);
        let page = self.config::<4>(0, SRIOV + 0x20) * 4096;
        let address = self.config::<8>(0, VF_BAR) & !0xf;
        let enabled = control & 1 != 0;
        let vfs = if enabled { num_vfs } else { 0 };
        let decoding = if control & 8 != 0 { vfs } else { 0 };
        let size = VF_SIZE.max(page);

        prop_assert!(num_vfs <= TOTAL.into());
        let expected: Vec<_> = (1..=vfs as u8).collect();
        prop_assert_eq!(self.answering(), expected);
        let membership = self.owner.membership().enabled_members();
        prop_assert_eq!(membership, enabled.then_some(vfs as u16));
        let ids = self.admin.members().map(|(id, _)| u64::from(id.0));
        prop_assert_eq!(ids.collect::<Vec<_>>(), (1..=vfs).collect::<Vec<_>>());

        let fits = address.checked_add(decoding * size).is_some();
        let backed = if fits { decoding } else { 0 };
        for index in 0..u64::from(TOTAL) + 2 {
            let mut bytes = [0xcc; 2];
            self.pf.memory_read(MEMBERS, index * size + 18, &mut bytes);
            let expected = if index < backed { QUEUES } else { 0xffff };
            prop_assert_eq!(wide(&bytes), expected, "BAR of VF {}", index);
        }
        let decoded = self.pf.decoded().into_iter();
        let members: Vec<_> = decoded.filter(|d| d.slot == MEMBERS).collect();
        let range = address..address.wrapping_add(backed * size);
        let expected = (backed != 0).then_some(Decoded {
            slot: MEMBERS,
            range,
        });
        prop_assert_eq!(members, expected.into_iter().collect::<Vec<_>>());
        let beyond = |d: &FunctionDoorbell| d.slot == MEMBERS && d.offset >= vfs * size;
        prop_assert!(!self.pf.doorbells().iter().any(beyond));

        for devfn in 1..=TOTAL {
            let closed = self.reasons(devfn).contains(Reasons::NO_DMA);
            let master = u64::from(devfn) <= vfs && self.config::<2>(devfn, 0x04) & 4 != 0;
            prop_assert_eq!(closed, !master, "gate of VF {}", devfn);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn d1_d2_the_vfs_that_answer_are_those_the_capability_says(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let rig = rig(TOTAL.into());
        rig.check()?;
        for step in &steps {
            rig.take(step);
            rig.check()?;
        }
    }
}
