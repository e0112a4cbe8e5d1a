//! Devices that are restored from the state of a snapshot.

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use devices::gate::Reasons;
use driver::access::Dma;
use driver::host::{HostDma, Machine};
use serde_json::Value;
use vmm::config::MachineSpec;
use vmm::console::output::Loss;
use vmm::machine::functions::{Backends, Functions};
use vmm::snapshot::devices as bus;
use vmm::snapshot::format::machine::{File, Machine as MachineJson, Peer, PfKind};
use vmm::snapshot::format::state::State;
use vmm::snapshot::format::{parse, write};

use crate::input::Input;
use crate::snapshot::change;

/// States of devices in use.
const GOOD: [&str; 3] = [
    include_str!("../../../vmm/tests/golden/v1/devices.json"),
    include_str!("../../../vmm/tests/golden/v1/owner.json"),
    include_str!("../../../vmm/tests/golden/v1/owners.json"),
];
/// What is changed in one of them.
const SECTIONS: [&str; 5] = [
    "/pci/functions",
    "/functions",
    "/functions",
    "/owners",
    "/machine",
];
/// Bytes of memory, which is what those states have.
const MEMORY: usize = 64 << 20;
/// Bytes of each disk.
const DISK: u64 = 64 << 10;
/// The most devices of a machine, members included.
const MAX_DEVICES: usize = 16;
/// How long devices may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(8);

/// Files for the disks of whatever machine there is at the time.
static FILES: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    for index in 0..=MAX_DEVICES {
        let path = dir.path().join(index.to_string());
        let file = std::fs::File::create(path).expect("a file");
        file.set_len(DISK).expect("space");
    }
    dir
});

/// Whoever made `state.json` wrote anything, or changed some of a good one. The devices refuse it, or are in a state in
/// which they work, come to rest, and are saved; and what they save is restored to the same.
pub fn snapshot_restore(data: &[u8]) {
    restore(data, &mut Input::new(&[]));
    let mut input = Input::new(data);
    let good = GOOD[usize::from(input.pick(GOOD.len() as u8))];
    let mut value: Value = serde_json::from_str(good).expect("a good one");
    let changes = input.pick(4);
    for _ in 0..changes {
        let section = SECTIONS[usize::from(input.pick(SECTIONS.len() as u8))];
        if let Some(section) = value.pointer_mut(section) {
            change(section, &mut input);
        }
    }
    let restored = restore(value.to_string().as_bytes(), &mut input);
    assert!(
        restored || changes != 0,
        "what nobody changed is a good one"
    );
}

/// True if the bytes are a state that devices have.
fn restore(bytes: &[u8], input: &mut Input<'_>) -> bool {
    let Ok(mut state) = parse::<State>(bytes) else {
        return false;
    };
    if !give_files(&mut state.machine) {
        return false;
    }
    let Ok(spec) = state.machine.to_spec() else {
        return false;
    };
    let memory = HostDma::new(0, MEMORY).expect("memory");
    let filling = input.slice(256);
    for (at, byte) in (0x1000..0x3000).zip(filling.iter().cycle()) {
        memory.write(at, &[*byte]);
    }
    let Some(rig) = Rig::build(&spec, &memory) else {
        return false;
    };
    if let Err(error) = rig.restore(&state) {
        assert!(error.len() < 4096, "{error}");
        return false;
    }
    rig.save(&mut state);
    drop(rig);
    let again = || {
        let rig = Rig::build(&spec, &memory).expect("the same again");
        let text = write(&state).expect("what is saved can be written");
        assert_eq!(parse::<State>(&text).as_ref(), Ok(&state));
        rig.restore(&state).expect("what was saved is restored");
        rig
    };
    let rig = again();
    let mut other = state.clone();
    rig.save(&mut other);
    // Time passes for a command that waits.
    let waits = |state: &State| {
        let mut sessions = state.owners.iter().flat_map(|owner| &owner.sessions);
        sessions.any(|session| session.transition.is_some())
    };
    assert!(other == state || waits(&state), "it is saved as it was");

    rig.drive(input);
    rig.save(&mut state);
    drop(rig);
    let rig = Rig::build(&spec, &memory).expect("the same again");
    rig.restore(&state).expect("what was saved is restored");
    true
}

/// Replaces the files of `machine`. False if it is too large, or has something of the host.
fn give_files(machine: &mut MachineJson) -> bool {
    let members: usize = machine.pfs.iter().map(|pf| usize::from(pf.vfs) + 1).sum();
    let queues = machine.disks.iter().all(|disk| disk.queues <= 8);
    if machine.disks.len() + machine.nets.len() + members > MAX_DEVICES || !queues {
        return false;
    }
    let mut next = 0..;
    let path = |index: usize| FILES.path().join(index.to_string());
    let mut file = || File {
        path: next.next().map(path).unwrap_or_default(),
        identity: None,
    };
    for disk in &mut machine.disks {
        disk.file = file();
    }
    for net in &machine.nets {
        if matches!(net.peer, Peer::Tap(_)) {
            return false;
        }
    }
    for pf in &mut machine.pfs {
        match &mut pf.device {
            PfKind::Net { uplink_tap, .. } if uplink_tap.is_some() => return false,
            PfKind::Net { .. } => {}
            PfKind::Block {
                file: own,
                vf_path,
                vf_files,
                readonly,
            } => {
                if let Some(own) = own {
                    *own = file();
                }
                if *readonly {
                    return false;
                }
                *vf_path = members_of(FILES.path());
                vf_files.clear();
            }
        }
    }
    "none".clone_into(&mut machine.console);
    if let Some(console) = &mut machine.virtio_console {
        "none".clone_into(console);
    }
    true
}

/// Files of members, from the last one down, so that they are no other disk's in a machine that is small enough. Those that
/// are make the machine one that cannot be.
fn members_of(directory: &Path) -> String {
    for number in 1..=MAX_DEVICES {
        let path = directory.join(format!("vf{number}"));
        if !path.exists() {
            let file = std::fs::File::create(path).expect("a file");
            file.set_len(DISK).expect("space");
        }
    }
    format!("{}/vf%d", directory.display())
}

struct Rig {
    machine: Machine,
    functions: Functions,
}

impl Rig {
    /// None if there cannot be such a machine.
    fn build(spec: &MachineSpec, memory: &HostDma) -> Option<Self> {
        let backends = Backends::open(spec, None, &Loss::default()).ok()?;
        let machine = Machine::with_memory(memory.clone()).expect("a machine");
        let (ram, msi) = (machine.dma().ram(), machine.msi());
        let functions = Functions::plug(backends, ram, machine.root(), msi).ok()?;
        for function in functions.all() {
            function.close(Reasons::PAUSED);
        }
        machine.power_on().ok()?;
        Some(Self { machine, functions })
    }

    fn restore(&self, state: &State) -> Result<(), String> {
        let (pci, functions) = (&state.pci, &state.functions);
        bus::restore(
            self.machine.root(),
            &self.functions,
            pci,
            functions,
            &state.owners,
        )
        .map_err(|error| error.to_string())
    }

    fn save(&self, state: &mut State) {
        state.pci = bus::save_pci(self.machine.root());
        state.functions = bus::save_functions(&self.functions).expect("it is at rest");
        state.owners = bus::save_owners(&self.functions);
    }

    /// Lets the guest go on for a moment: queues are notified, and registers written.
    fn drive(&self, input: &mut Input<'_>) {
        for function in self.functions.all() {
            function.signal_again();
        }
        self.functions.reopen(Reasons::PAUSED);
        for function in self.functions.all() {
            for queue in 0..function.total_queues() {
                if let Some(event) = function.kick_event(queue) {
                    // Refused only if it is signalled already.
                    let _ = event.write(1);
                }
            }
        }
        for _ in 0..input.pick(8) {
            let place = driver::pci::Address {
                bus: input.pick(3),
                devfn: input.byte(),
            };
            let function = self.machine.function(place);
            let at = input.word() & 0x3fc;
            let value = input.dword().to_le_bytes();
            if input.pick(2) == 0 {
                driver::access::Function::write_config(&function, at, &value);
            } else {
                driver::access::Function::write_bar(&function, 0, at.into(), &value);
            }
        }
        self.functions
            .close_and_drain(Reasons::PAUSED, PATIENCE)
            .expect("devices come to rest");
    }
}
