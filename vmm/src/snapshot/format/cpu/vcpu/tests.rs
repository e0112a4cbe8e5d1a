use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::kvm::state::MpState as State;

/// Something of everything.
pub fn sample() -> VcpuState {
    let mut next = 0u64;
    let mut number = || {
        next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        next
    };
    let mut segment = |kind| kvm_segment {
        base: number(),
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: kind,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        ..kvm_segment::default()
    };
    let mut sregs = kvm_sregs2 {
        cs: segment(11),
        ds: segment(3),
        es: segment(3),
        fs: segment(3),
        gs: segment(3),
        ss: segment(3),
        tr: segment(11),
        ldt: segment(2),
        cr0: 0xe000_0011,
        efer: 0x500,
        flags: 1,
        pdptrs: [1, 2, 3, u64::MAX],
        ..kvm_sregs2::default()
    };
    sregs.gdt.base = 0x7000;
    sregs.idt.limit = 0xfff;
    let mut state = VcpuState {
        mp_state: State::Halted,
        regs: kvm_regs {
            rax: u64::MAX,
            rip: 0xffff_ffff_8100_0000,
            r15: 1,
            rflags: 2,
            ..kvm_regs::default()
        },
        sregs,
        xcrs: vec![(0, 0xe7)],
        xsave: (0..4096).map(|i| i as u8).collect(),
        debugregs: kvm_debugregs {
            db: [1, 2, 3, 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..kvm_debugregs::default()
        },
        lapic: Box::new([0x5a; LAPIC_SIZE]),
        tsc: 1 << 60,
        msrs: vec![(0x174, 0x10), (0x6e0, 7), (0xc000_0102, u64::MAX)],
        events: Default::default(),
    };
    let events = &mut state.events;
    events.exception.pending = 1;
    events.exception.nr = 14;
    events.exception.has_error_code = 1;
    events.exception.error_code = 2;
    events.exception_has_payload = 1;
    events.exception_payload = 0xdead_beef;
    events.interrupt.nr = 0xec;
    events.interrupt.injected = 1;
    events.interrupt.shadow = 2;
    events.nmi.pending = 2;
    events.nmi.masked = 1;
    events.smi.latched_init = 1;
    events.triple_fault.pending = 1;
    events.flags = 0x3d;
    state
}

#[test]
fn a_vcpu_is_the_same_after_json() {
    let json = Vcpu::of(&sample());
    let text = serde_json::to_string(&json).unwrap();
    let read: Vcpu = serde_json::from_str(&text).unwrap();
    assert_eq!(read, json);
    assert_eq!(read.plain(4096), Ok(sample()));
}

fn refusal(change: impl FnOnce(&mut Vcpu)) -> String {
    let mut json = Vcpu::of(&sample());
    change(&mut json);
    json.plain(4096).unwrap_err().to_string()
}

#[test]
fn what_is_in_no_vcpu_is_refused_by_name() {
    let msr = |index| Msr {
        index: Hex(index),
        value: Hex(1),
    };
    for (text, expected) in [
        (
            refusal(|v| v.lapic.0.push(0)),
            "lapic: has 1025 bytes, not 1024",
        ),
        (
            refusal(|v| v.xsave.0.truncate(576)),
            "xsave: has 576 bytes, and cpu_model.xsave_size is 4096",
        ),
        (
            refusal(|v| v.special_registers.cs.kind = 16),
            "special_registers.cs.type: 16 is more than 15",
        ),
        (
            refusal(|v| v.special_registers.ldt.dpl = 4),
            "special_registers.ldt.dpl: 4 is more than 3",
        ),
        (
            refusal(|v| v.xcrs = vec![v.xcrs[0]; 2]),
            "xcrs[1]: 0 follows 0; the list ascends",
        ),
        (
            refusal(|v| v.xcrs = vec![v.xcrs[0]; 17]),
            "xcrs: 17 registers are more than 16",
        ),
        (
            refusal(|v| v.msrs[1] = v.msrs[0]),
            "msrs[1]: 0x174 follows 0x174; the list ascends",
        ),
        (
            refusal(|v| v.msrs.insert(0, msr(0x10))),
            "msrs[0x10]: is no register that is kept here",
        ),
        (
            refusal(|v| v.msrs = vec![msr(1); 1025]),
            "msrs: 1025 registers are more than 1024",
        ),
        (
            refusal(|v| v.events.exception.vector = 32),
            "events.exception.vector: 32 is more than 31",
        ),
        (
            refusal(|v| v.events.interrupt.shadow = 4),
            "events.interrupt.shadow: 4 is more than 3",
        ),
        (
            refusal(|v| v.events.nmi.pending = 3),
            "events.nmi.pending: 3 is more than 2",
        ),
    ] {
        assert_eq!(text, expected);
    }
}

#[test]
fn unknown_and_missing_members_are_refused() {
    let good = serde_json::to_value(Vcpu::of(&sample())).unwrap();
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut value = good.clone();
        change(&mut value);
        serde_json::from_value::<Vcpu>(value)
            .unwrap_err()
            .to_string()
    };
    for (text, part) in [
        (refused(&|v| v["surplus"] = 1.into()), "surplus"),
        (refused(&|v| v["registers"]["rzx"] = "0x1".into()), "rzx"),
        (refused(&|v| v["mp_state"] = "asleep".into()), "asleep"),
        (refused(&|v| v["tsc"] = 7.into()), "expected a string"),
        (refused(&|v| v["version"] = 2.into()), "version 2"),
        (
            refused(&|v| drop(v["events"].as_object_mut().unwrap().remove("nmi"))),
            "nmi",
        ),
    ] {
        assert!(text.contains(part), "{text}");
    }
}

/// All places in a document.
fn places(value: &Value) -> Vec<String> {
    fn walk(value: &Value, path: &str, found: &mut Vec<String>) {
        found.push(path.to_owned());
        match value {
            Value::Array(list) => {
                for (i, entry) in list.iter().enumerate() {
                    walk(entry, &format!("{path}/{i}"), found);
                }
            }
            Value::Object(members) => {
                for (name, member) in members {
                    walk(member, &format!("{path}/{name}"), found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(value, "", &mut found);
    found
}

fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<u8>().prop_map(|n| Value::from(format!("{n:#x}"))),
        any::<u128>().prop_map(|n| Value::from(format!("{n:#x}"))),
        "[0-9a-f]{0,40}".prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever is put wherever: it is refused, or it is a state whose JSON is that.
    #[test]
    fn corrupted_json_is_refused_or_means_what_it_says(
        changes in prop::collection::vec((any::<prop::sample::Index>(), anything()), 1..4),
        xsave_size in prop_oneof![Just(4096u32), any::<u32>()],
    ) {
        let mut value = serde_json::to_value(Vcpu::of(&sample())).unwrap();
        for (place, new) in changes {
            let all = places(&value);
            let path: &String = place.get(&all);
            if let Some(at) = value.pointer_mut(path) {
                *at = new;
            }
        }
        if let Ok(read) = serde_json::from_value::<Vcpu>(value)
            && let Ok(state) = read.plain(xsave_size)
        {
            prop_assert_eq!(Vcpu::of(&state), read);
        }
    }
}
