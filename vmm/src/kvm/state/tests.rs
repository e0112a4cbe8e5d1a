//! Saving and restoring with the KVM of this host.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::kvm::cpu;
use crate::vcpu::kick;

const RAM: usize = 1 << 20;

/// A VM with a megabyte of memory.
struct Machine {
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    ram: GuestMemoryMmap,
}

impl Machine {
    // Nobody asks which of its pages are dirty.
    #[allow(unsafe_code, clippy::disallowed_methods)]
    fn new(kvm: &Kvm, model: &CpuModel, cpus: u64) -> Self {
        let ram: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_identity_map_address(crate::layout::KVM_IDENTITY_MAP)
            .unwrap();
        vm.set_tss_address(crate::layout::KVM_TSS as usize).unwrap();
        model.prepare_vm(&vm).unwrap();
        vm.create_irq_chip().unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: the region is a live mapping of that size, which is dropped after the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpus = (0..cpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
        Self { vcpus, vm, ram }
    }

    /// New, and configured as for a kernel's start.
    fn booted(kvm: &Kvm, model: &CpuModel, cpus: u64) -> Self {
        let machine = Self::new(kvm, model, cpus);
        for (id, vcpu) in (0u8..).zip(&machine.vcpus) {
            cpu::configure(vcpu, model, id).unwrap();
        }
        machine
    }

    fn save(&self, model: &CpuModel) -> State {
        save_directly(&self.vm, &self.vcpus, model, &registers(model)).unwrap()
    }

    fn restore(
        &self,
        model: &CpuModel,
        state: &State,
        choice: ClockChoice,
    ) -> Result<(), StateError> {
        restore(&self.vm, &self.vcpus, model, state, choice)
    }
}

/// The registers that are state on this host.
fn registers(model: &CpuModel) -> Vec<u32> {
    let listed = crate::kvm::open().unwrap().get_msr_index_list().unwrap();
    msrs::saved(listed.as_slice(), model.performance_counters)
}

fn host() -> Option<(Kvm, HostCpu)> {
    let Ok(kvm) = crate::kvm::open() else {
        println!("skipped: no KVM here");
        return None;
    };
    let host = HostCpu::examine(&kvm).unwrap();
    Some((kvm, host))
}

/// Whether KVM sets clocks. One that only interprets may have no other than the host's.
fn keeps_time(machine: &Machine) -> bool {
    const OFFSET: u64 = 1 << 40;
    let [.., last] = machine.vcpus.as_slice() else {
        return false;
    };
    let before = ioctl::get_tsc_offset(last);
    let set = before.and_then(|_| ioctl::set_tsc_offset(last, OFFSET).ok());
    let kept = set.is_some() && ioctl::get_tsc_offset(last) == Some(OFFSET);
    if kept {
        ioctl::set_tsc_offset(last, before.unwrap()).unwrap();
    } else {
        println!("skipped: this KVM does not set clocks");
    }
    kept
}

/// Numbers that repeat only after a long time.
fn pattern(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed;
    move || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        x >> 8
    }
}

/// Sets something in every class of registers that differs from what a new vCPU has.
fn scramble(machine: &Machine) {
    let entry = crate::boot::Entry {
        rip: 0x1000,
        zero_page: 0x3000,
    };
    for (id, vcpu) in machine.vcpus.iter().enumerate() {
        let mut next = pattern(id as u64 + 1);
        cpu::enter(vcpu, entry).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr2 = next() >> 9;
        sregs.cr8 = 5;
        sregs.fs.base = next() >> 9;
        sregs.ldt.limit = 0x1234;
        sregs.gdt.base = 0x7000 + id as u64;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rax, regs.rbx, regs.r8, regs.r15) = (next(), next(), next(), next());
        vcpu.set_regs(&regs).unwrap();

        let access = access(&machine.vm);
        let mut xsave = ioctl::get_xsave(vcpu, access.xsave_size).unwrap();
        // XMM registers, and in the header that they are in use.
        xsave[160..416].fill_with(|| next() as u8);
        xsave[512] |= 2;
        ioctl::set_xsave(vcpu, &xsave, access.xsave_size).unwrap();
        let mut debug = vcpu.get_debug_regs().unwrap();
        debug.db = [next() >> 9, next() >> 9, 0x3000, 0x4000];
        vcpu.set_debug_regs(&debug).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        // Enabled, with a requested vector and a timer in deadline mode.
        lapic.regs[0xf1] = 1;
        lapic.regs[0xf0] = 0xffu8 as _;
        lapic.regs[0x220] = 1 << 3;
        lapic.regs[0x320] = 0x31;
        lapic.regs[0x322] = 4;
        vcpu.set_lapic(&lapic).unwrap();
        for (index, value) in [
            (0x174, 0x10),
            (0x175, next() >> 9),
            (0x200, 0x6),
            (0x277, 0x0006_0406_0007_0406),
            (0xc000_0081, next()),
            (0xc000_0082, next() >> 9),
            (0xc000_0102, next() >> 9),
            // Far in the future.
            (msrs::IA32_TSC_DEADLINE, u64::MAX >> 4),
        ] {
            vcpu::write_msr(vcpu, id, index, value).unwrap();
        }
        let mut events = vcpu.get_vcpu_events().unwrap();
        events.nmi.masked = 1;
        events.interrupt.shadow = 1;
        vcpu.set_vcpu_events(&events).unwrap();
    }
    if let [_, second, ..] = machine.vcpus.as_slice() {
        let mp_state = KVM_MP_STATE_HALTED;
        second
            .set_mp_state(kvm_bindings::kvm_mp_state { mp_state })
            .unwrap();
    }
    let mut irqchip = IrqchipState::save(&machine.vm).unwrap();
    irqchip.master.imr = 0xfb;
    irqchip.slave.irq_base = 0x28;
    irqchip.ioapic.id = 3;
    irqchip.ioapic.redirtbl[4].bits = 0x0100_0000_0000_0034;
    irqchip.restore(&machine.vm).unwrap();
}

/// What is read of the JSON of a model and a state.
fn through_json(model: &CpuModel, state: &State) -> (CpuModel, State) {
    use crate::snapshot::format::{clock, cpu, irqchip};
    fn again<T: serde::Serialize + serde::de::DeserializeOwned>(value: T) -> T {
        serde_json::from_str(&serde_json::to_string(&value).unwrap()).unwrap()
    }
    let read = again(cpu::CpuModel::of(model)).plain().unwrap();
    assert_eq!(&read, model);
    let vcpu = |v| again(cpu::Vcpu::of(v)).plain(read.xsave_size).unwrap();
    let state = State {
        irqchip: again(irqchip::Irqchip::of(&state.irqchip)).plain().unwrap(),
        clock: again(clock::Clock::of(&state.clock)).plain().unwrap(),
        vcpus: state.vcpus.iter().map(vcpu).collect(),
    };
    (read, state)
}

/// Without what advances by itself; says by how much the counters had.
fn at_rest(mut state: State) -> (State, Vec<u64>) {
    let counters = state.vcpus.iter().map(|v| v.tsc).collect();
    for vcpu in &mut state.vcpus {
        vcpu.tsc = 0;
    }
    state.clock = ClockState {
        clock: 0,
        realtime: 0,
    };
    (state, counters)
}

/// As [`at_rest`], without the bits that say which components of the XSAVE area are in use: a processor may find components
/// in use that have their first values, once it has loaded and stored them.
fn without_use(state: State) -> State {
    let mut state = at_rest(state).0;
    for vcpu in &mut state.vcpus {
        vcpu.xsave[512..520].fill(0);
    }
    state
}

#[test]
fn every_register_class_is_what_it_was_in_a_second_vm() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 2);
    let first = Machine::booted(&kvm, &model, 2);
    let fresh = at_rest(first.save(&model)).0;
    scramble(&first);
    let saved = first.save(&model);
    assert_eq!(saved.check_host(&host), []);

    let (model, read) = through_json(&model, &saved);
    assert_eq!(model.check_host(&host), []);
    assert!(read == saved, "{}", first_difference(&read, &saved));
    let second = Machine::new(&kvm, &model, 2);
    second.restore(&model, &read, ClockChoice::Saved).unwrap();
    let again = second.save(&model);
    let third = Machine::new(&kvm, &model, 2);
    third.restore(&model, &again, ClockChoice::Host).unwrap();
    let third = third.save(&model);

    let (saved, before) = at_rest(saved);
    let (again, after) = at_rest(again);
    let (third, later) = at_rest(third);
    // Without the values, which fill pages.
    assert!(again == saved, "{}", first_difference(&again, &saved));
    assert!(third == saved, "{}", first_difference(&third, &saved));
    assert!(
        before < after && after < later,
        "{before:?} {after:?} {later:?}"
    );
    // That nothing was set would be equal, too.
    for (new, old) in fresh.vcpus.iter().zip(&saved.vcpus) {
        assert_eq!(differing(new, old).len(), 7, "{:?}", differing(new, old));
    }
    assert_ne!(fresh.vcpus[1].mp_state, saved.vcpus[1].mp_state);
    assert_ne!(fresh.irqchip, saved.irqchip);
}

/// The classes in which two vCPUs differ, apart from `mp_state`.
fn differing(a: &VcpuState, b: &VcpuState) -> Vec<&'static str> {
    let classes = [
        ("regs", a.regs == b.regs),
        ("sregs", a.sregs == b.sregs),
        ("xcrs", a.xcrs == b.xcrs),
        ("xsave", a.xsave == b.xsave),
        ("debugregs", a.debugregs == b.debugregs),
        ("lapic", a.lapic == b.lapic),
        ("msrs", a.msrs == b.msrs),
        ("events", a.events == b.events),
    ];
    classes
        .iter()
        .filter(|(_, same)| !same)
        .map(|(class, _)| *class)
        .collect()
}

fn first_difference(a: &State, b: &State) -> String {
    let vcpus = std::iter::zip(&a.vcpus, &b.vcpus);
    let of_vcpus: Vec<_> = vcpus.map(|(a, b)| differing(a, b)).collect();
    format!("irqchip {} vcpus {of_vcpus:?}", a.irqchip == b.irqchip)
}

#[test]
fn clocks_go_on_where_they_stopped_or_by_the_time_that_has_passed() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 2);
    let first = Machine::booted(&kvm, &model, 2);
    if !keeps_time(&first) {
        return;
    }
    let mut saved = first.save(&model);
    const HOUR: u64 = 3_600_000_000_000;
    const SLACK: u64 = 60_000_000_000;
    saved.clock.realtime -= HOUR;
    let ticks = |ns: u64| u128::from(ns) * u128::from(model.tsc_khz) / 1_000_000;
    for (choice, passed) in [(ClockChoice::Saved, 0), (ClockChoice::Host, HOUR)] {
        let machine = Machine::new(&kvm, &model, 2);
        machine.restore(&model, &saved, choice).unwrap();
        let now = machine.save(&model);
        let clock = now.clock.clock - saved.clock.clock;
        assert!(
            (passed..passed + SLACK).contains(&clock),
            "{choice:?} {clock}"
        );
        let counter = u128::from(now.vcpus[0].tsc - saved.vcpus[0].tsc);
        let expected = ticks(passed)..ticks(passed + SLACK);
        assert!(expected.contains(&counter), "{choice:?} {counter}");
        assert_eq!(now.vcpus[0].tsc, now.vcpus[1].tsc);
    }
}

#[test]
fn counters_that_a_guest_set_apart_stay_apart() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 2);
    let first = Machine::booted(&kvm, &model, 2);
    if !keeps_time(&first) {
        return;
    }
    let mut saved = first.save(&model);
    assert_eq!(saved.vcpus[0].tsc, saved.vcpus[1].tsc);
    saved.vcpus[1].tsc += 12345;
    let second = Machine::new(&kvm, &model, 2);
    second.restore(&model, &saved, ClockChoice::Saved).unwrap();
    let again = second.save(&model);
    assert_eq!(again.vcpus[1].tsc - again.vcpus[0].tsc, 12345);
}

#[test]
fn values_that_kvm_refuses_are_errors_that_name_their_class() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 1);
    let good = Machine::booted(&kvm, &model, 1).save(&model);
    type Change = fn(&mut VcpuState);
    let changes: [(&str, Change); 6] = [
        ("vcpus[0].special_registers", |v| {
            // Long mode without paging.
            v.sregs.efer = 1 << 10;
            v.sregs.cr0 = 1 << 31;
        }),
        ("vcpus[0].xcrs", |v| v.xcrs = vec![(0, 0)]),
        ("vcpus[0].xsave", |v| v.xsave[512..520].fill(0xff)),
        ("vcpus[0].debug_registers", |v| v.debugregs.dr7 = u64::MAX),
        ("vcpus[0].events", |v| {
            v.events.exception.injected = 1;
            v.events.exception.nr = 77;
        }),
        ("vcpus[0].msrs[0xdeadbeef]", |v| {
            v.msrs.push((0xdead_beef, 7));
        }),
    ];
    for (class, change) in changes {
        let mut state = good.clone();
        change(&mut state.vcpus[0]);
        let machine = Machine::new(&kvm, &model, 1);
        let refused = machine.restore(&model, &state, ClockChoice::Saved);
        let text = refused.map_err(|e| e.to_string());
        let named = text.as_ref().is_err_and(|text| text.contains(class));
        println!("{class}: {text:?}");
        assert!(named, "{class}: {text:?}");
    }
    let machine = Machine::new(&kvm, &model, 2);
    let refused = machine.restore(&model, &good, ClockChoice::Saved);
    assert!(matches!(
        refused,
        Err(StateError::Vcpus { saved: 1, here: 2 })
    ));
}

#[test]
fn what_another_kvm_lacks_is_listed() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 2);
    let mut state = Machine::booted(&kvm, &model, 2).save(&model);
    for vcpu in &mut state.vcpus {
        vcpu.events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        vcpu.msrs.push((0xdead_beef, 7));
        vcpu.msrs.push((0xdead_bef0, 0));
    }
    state.vcpus[1].events.exception.pending = 1;
    let mut other = host;
    other.capabilities.exception_payload = false;
    let found: Vec<_> = state
        .check_host(&other)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        found,
        [
            "vcpus[0].msrs[0xdeadbeef] (a register without a name here): the snapshot has 0x7, this host does not keep \
             that register",
            "vcpus[1].events.exception: the snapshot has one under way, this host does not have KVM_CAP_EXCEPTION_PAYLOAD",
        ]
    );
}

/// Runs until the guest writes to a port, and says which and what.
fn run_to_port(machine: &mut Machine, patience: Duration) -> Option<(u16, u8)> {
    let vcpu = &mut machine.vcpus[0];
    let alarm = kick::Alarm::start(vcpu, patience).unwrap();
    let deadline = Instant::now() + patience;
    let written = loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => break Some((port, data[0])),
            Ok(VcpuExit::Hlt | VcpuExit::Intr) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => panic!("{error}"),
        }
        vcpu.set_kvm_immediate_exit(0);
        if Instant::now() >= deadline {
            break None;
        }
    };
    drop(alarm);
    // Completes the access.
    vcpu.set_kvm_immediate_exit(1);
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
    written
}

/// How the timer of a guest is armed.
#[derive(Clone, Copy, Debug)]
enum Timer {
    Deadline,
    OneShot,
}

/// A guest in real mode that has said `'a'`, waits for the interrupt of its timer, and then says `'t'`.
fn sleeper(kvm: &Kvm, model: &CpuModel, timer: Timer, delay: Duration) -> Machine {
    const VECTOR: u8 = 0x40;
    #[rustfmt::skip]
    const MAIN: [u8; 11] = [
        0xb0, b'a', // mov al, 'a'
        0xe6, 0x80, // out 0x80, al
        0xfb, // sti
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
        0x90, 0x90, 0x90,
    ];
    const HANDLER: [u8; 6] = [
        0xb0, b't', // mov al, 't'
        0xe6, 0x81, // out 0x81, al
        0xf4, 0xf4, // hlt
    ];
    let mut machine = Machine::booted(kvm, model, 1);
    machine
        .ram
        .write_slice(&MAIN, GuestAddress(0x1000))
        .unwrap();
    machine
        .ram
        .write_slice(&HANDLER, GuestAddress(0x1100))
        .unwrap();
    // The vector's handler: segment 0, offset 0x1100.
    let entry = GuestAddress(4 * u64::from(VECTOR));
    machine.ram.write_slice(&[0x00, 0x11, 0, 0], entry).unwrap();
    let vcpu = &machine.vcpus[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rsp) = (0x1000, 0x8000);
    vcpu.set_regs(&regs).unwrap();

    assert_eq!(
        run_to_port(&mut machine, Duration::from_secs(30)),
        Some((0x80, b'a'))
    );
    let vcpu = &machine.vcpus[0];
    let mut lapic = vcpu.get_lapic().unwrap();
    let mut set = |register: usize, value: u32| {
        for (to, from) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *to = from as _;
        }
    };
    set(0xf0, 0x1ff);
    match timer {
        Timer::Deadline => set(0x320, 2 << 17 | u32::from(VECTOR)),
        Timer::OneShot => {
            // A bus of 1 GHz, divided by 128.
            let count = (delay.as_nanos() / 128) as u32;
            set(0x320, u32::from(VECTOR));
            set(0x3e0, 0b1010);
            set(0x380, count);
            set(0x390, count);
        }
    }
    vcpu.set_lapic(&lapic).unwrap();
    if let Timer::Deadline = timer {
        let now = vcpu::read_msr(vcpu, msrs::IA32_TSC).unwrap();
        let ticks = delay.as_millis() as u64 * u64::from(model.tsc_khz);
        vcpu::write_msr(vcpu, 0, msrs::IA32_TSC_DEADLINE, now + ticks).unwrap();
    }
    machine
}

/// Timers that are due later, that have become due between the snapshot and the restore, and that became due before the
/// snapshot, while the vCPU was not in the guest.
#[test]
fn a_timer_that_was_armed_fires_after_the_restore() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 1);
    kick::install().unwrap();
    let ms = Duration::from_millis;
    for timer in [Timer::Deadline, Timer::OneShot] {
        for (delay, before, away, choice) in [
            (ms(300), ms(0), ms(0), ClockChoice::Saved),
            (ms(300), ms(0), ms(400), ClockChoice::Saved),
            (ms(300), ms(0), ms(400), ClockChoice::Host),
            (ms(20), ms(60), ms(0), ClockChoice::Saved),
        ] {
            let case = format!("{timer:?} {delay:?} {before:?} {away:?} {choice:?}");
            let first = sleeper(&kvm, &model, timer, delay);
            std::thread::sleep(before);
            let state = first.save(&model);
            std::thread::sleep(away);
            let mut second = Machine::new(&kvm, &model, 1);
            let mut memory = vec![0; RAM];
            first.ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
            second.ram.write_slice(&memory, GuestAddress(0)).unwrap();
            drop(first);
            second.restore(&model, &state, choice).unwrap();
            let written = run_to_port(&mut second, Duration::from_secs(20));
            assert_eq!(written, Some((0x81, b't')), "{case}");
        }
    }
}

/// A deadline is in the guest's time: it must not come earlier than that.
#[test]
fn a_timer_that_is_due_later_does_not_fire_at_once() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 1);
    kick::install().unwrap();
    let first = sleeper(&kvm, &model, Timer::Deadline, Duration::from_secs(3600));
    let state = first.save(&model);
    let mut second = Machine::new(&kvm, &model, 1);
    let mut memory = vec![0; RAM];
    first.ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
    second.ram.write_slice(&memory, GuestAddress(0)).unwrap();
    second.restore(&model, &state, ClockChoice::Saved).unwrap();
    assert_eq!(run_to_port(&mut second, Duration::from_millis(100)), None);
    let again = second.save(&model);
    let deadline = |state: &State| {
        let mut msrs = state.vcpus[0].msrs.iter();
        msrs.find(|(index, _)| *index == msrs::IA32_TSC_DEADLINE)
            .map(|(_, value)| *value)
    };
    assert_eq!(deadline(&again), deadline(&state));
    assert_ne!(deadline(&again), Some(0));
    let mp_state = again.vcpus[0].mp_state;
    assert!(matches!(mp_state, MpState::Halted | MpState::Runnable));
}

#[test]
fn vcpus_with_threads_are_saved_while_they_are_parked() {
    let Some((kvm, host)) = host() else { return };
    let model = CpuModel::new(&host, 2);
    kick::install().unwrap();
    let mut machine = Machine::booted(&kvm, &model, 2);
    scramble(&machine);
    let directly = machine.save(&model);
    let control = std::sync::Arc::new(Control::new(2).unwrap());
    let wiring = crate::vcpu::Wiring {
        ports: Default::default(),
        mmio: Default::default(),
        control: control.clone(),
        tells_pause: false,
        layout_changed: std::sync::Arc::new(|| ()),
    };
    let threads: Vec<_> = (0u8..)
        .zip(machine.vcpus.drain(..))
        .map(|(id, vcpu)| {
            crate::vcpu::Thread::spawn(id, wiring.clone())
                .unwrap()
                .give(vcpu)
        })
        .collect();
    let on_threads = save(&machine.vm, &control, &model, &registers(&model)).unwrap();
    control.finish(crate::exit::Outcome::PowerOff);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(without_use(on_threads) == without_use(directly));
    let ended = save(&machine.vm, &control, &model, &registers(&model));
    assert!(matches!(
        ended,
        Err(StateError::Control(ControlError::Ended))
    ));
}

#[test]
fn the_8259s_of_a_new_machine_are_masked() {
    let Some((kvm, _)) = host() else { return };
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    irqchip::mask_pics(&vm).unwrap();
    let chips = IrqchipState::save(&vm).unwrap();
    assert_eq!((chips.master.imr, chips.slave.imr), (u8::MAX, u8::MAX));
}
