//! `state.json` as a whole.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::time::SystemTime;

use migration::{SnapshotId, memory::Digest};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::clock::Clock;
use super::cpu::{CpuModel, Vcpu};
use super::document::Document;
use super::error::{At, Invalid, check_name, convert_all};
use super::function::Function;
use super::hex::HexBytes;
use super::irqchip::Irqchip;
use super::machine::Machine;
use super::owner::Owner;
use super::pci::Pci;
use super::serial::Serial;
use super::version::Version;
use crate::kvm::{model, state};

/// Name of the format.
pub const FORMAT: &str = "tern-snapshot";
/// Newest version of the format.
pub const NEWEST: u32 = 1;

/// The member `format` of a document: always [`FORMAT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatName;

impl Serialize for FormatName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(FORMAT)
    }
}

impl<'de> Deserialize<'de> for FormatName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        if text == FORMAT {
            Ok(Self)
        } else {
            Err(D::Error::invalid_value(Unexpected::Str(&text), &FORMAT))
        }
    }
}

impl JsonSchema for FormatName {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "FormatName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "const": FORMAT })
    }
}

/// State of a whole VM, but for its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Name of the format.
    pub format: FormatName,
    /// Version of the format.
    pub version: Version<NEWEST>,
    /// What names this snapshot, 32 hexadecimal digits: its memory has it too.
    pub id: HexBytes,
    /// Who made it, and when.
    pub created: Created,
    /// What the machine is built from.
    pub machine: Machine,
    /// Guest memory.
    pub memory: Memory,
    /// The processor the guest sees.
    pub cpu_model: CpuModel,
    /// State of each vCPU, in their order.
    pub vcpus: Vec<Vcpu>,
    /// Interrupt controllers that vCPUs share.
    pub irqchip: Irqchip,
    /// The guest's clock.
    pub clock: Clock,
    /// Registers of everything on the PCI bus.
    pub pci: Pci,
    /// Virtio functions that exist.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
}

/// Who made a snapshot, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Created {
    /// The program and its version.
    pub by: String,
    /// When, as in `2026-11-28T14:00:00Z`.
    pub at: String,
}

/// Guest memory. It is in `memory.bin`, and its layout follows from its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// BLAKE3 digest of the memory, in 64 hexadecimal digits, as `memory.bin` has it.
    pub digest: HexBytes,
}

impl Created {
    /// By this program, at `time`.
    pub fn now(time: SystemTime) -> Self {
        Self {
            by: format!("tern {}", env!("CARGO_PKG_VERSION")),
            at: humantime::format_rfc3339_seconds(time).to_string(),
        }
    }
}

impl Document for State {
    const FORMAT: &'static str = FORMAT;
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;

    fn validate(&self) -> Result<(), Invalid> {
        self.id()?;
        self.digest()?;
        self.cpu()?;
        validate_devices(&self.pci, &self.functions, &self.owners, &self.serial)
    }
}

/// Looks at what the types of these members of a document cannot say.
pub(super) fn validate_devices(
    pci: &Pci,
    functions: &[Function],
    owners: &[Owner],
    serial: &Serial,
) -> Result<(), Invalid> {
    pci.plain().field("pci")?;
    convert_all(functions, |function| {
        check_name(&function.name)?;
        function.context_bytes()?;
        function.transient()
    })
    .field("functions")?;
    convert_all(owners, Owner::plain).field("owners")?;
    serial.plain().field("serial")?;
    Ok(())
}

/// What a state is made of.
pub struct Parts<'a> {
    /// What names the snapshot.
    pub id: SnapshotId,
    /// Digest of its memory.
    pub digest: Digest,
    /// What the machine is built from.
    pub machine: Machine,
    /// The processor the guest sees.
    pub model: &'a model::CpuModel,
    /// vCPUs, interrupt controllers, clock.
    pub cpu: &'a state::State,
    /// Registers on the PCI bus.
    pub pci: Pci,
    /// Virtio functions.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
}

impl State {
    /// The state made of `parts`, now.
    pub fn of(parts: Parts<'_>) -> Self {
        Self {
            format: FormatName,
            version: Version::default(),
            id: HexBytes(parts.id.0.to_vec()),
            created: Created::now(SystemTime::now()),
            machine: parts.machine,
            memory: Memory {
                digest: HexBytes(parts.digest.0.to_vec()),
            },
            cpu_model: CpuModel::of(parts.model),
            vcpus: parts.cpu.vcpus.iter().map(Vcpu::of).collect(),
            irqchip: Irqchip::of(&parts.cpu.irqchip),
            clock: Clock::of(&parts.cpu.clock),
            pci: parts.pci,
            functions: parts.functions,
            owners: parts.owners,
            serial: parts.serial,
        }
    }

    /// What names the snapshot.
    ///
    /// # Errors
    ///
    /// Another number of bytes.
    pub fn id(&self) -> Result<SnapshotId, Invalid> {
        exactly(&self.id).map(SnapshotId).field("id")
    }

    /// The digest of its memory.
    ///
    /// # Errors
    ///
    /// Another number of bytes.
    pub fn digest(&self) -> Result<Digest, Invalid> {
        let digest = exactly(&self.memory.digest).map(Digest);
        digest.field("digest").field("memory")
    }

    /// The processor, and the state of vCPUs, interrupt controllers and clock.
    ///
    /// # Errors
    ///
    /// The first value that none has.
    pub fn cpu(&self) -> Result<(model::CpuModel, state::State), Invalid> {
        let model = self.cpu_model.plain().field("cpu_model")?;
        let state = state::State {
            irqchip: self.irqchip.plain().field("irqchip")?,
            clock: self.clock.plain().field("clock")?,
            vcpus: convert_all(&self.vcpus, |vcpu| vcpu.plain(model.xsave_size)).field("vcpus")?,
        };
        Ok((model, state))
    }
}

fn exactly<const N: usize>(bytes: &HexBytes) -> Result<[u8; N], Invalid> {
    let found = bytes.0.as_slice().try_into();
    found.map_err(|_| Invalid::new(format!("has {} bytes instead of {N}", bytes.0.len())))
}

#[cfg(test)]
pub(crate) mod tests {
    use devices::state::{
        FunctionState, OwnedBuffer, OwnedChain, OwnedKind, PackedState, QueueState, RegisterState,
        RingState, Shape, SplitState,
    };
    use devices::virtio::Position;

    use super::super::context::{Context, Field, Raw};
    use super::super::hex::{Hex, HexBytes};
    use super::super::{clock, cpu, document, function, irqchip, owner, parse, pci, serial, write};
    use super::*;
    use crate::config::Config;

    /// Something of everything.
    pub fn sample() -> State {
        let shape = Shape {
            queue_sizes: vec![8],
            config_len: 3,
            queue_status: true,
            packed: false,
        };
        let state = FunctionState {
            offered: 1 << 100 | 3,
            accepted: 1,
            registers: RegisterState {
                num_queues: 1,
                status: 0xf,
                ..RegisterState::default()
            },
            queues: vec![QueueState {
                size: 8,
                vector: 1,
                descriptor_area: 0x1000,
                driver_area: 0x2000,
                device_area: 0x1_0000_3000,
                enabled: true,
                stopped: true,
                restarts: true,
                ring: RingState::Split(SplitState {
                    next_available: 9,
                    next_used: 7,
                    owned: vec![3, 1],
                }),
            }],
            config: vec![1, 2, 3],
        };
        let mut context = Context::of_state(&state, &shape);
        context.0.extend([
            Field::Raw(Raw {
                kind: Hex(0x1234),
                reserved: Some(Hex(1)),
                value: HexBytes(vec![0xaa]),
            }),
            serde_json::from_str(
                r#"{"type": "VQ_PACKED_RUNTIME", "queue": 0, "enabled": true, "available": {"descriptor": 1, "wrap": true},
                    "used": {"descriptor": 0, "wrap": false}}"#,
            )
            .unwrap(),
            serde_json::from_str(
                r#"{"type": "VQ_PACKED_DEV_OWN_DESC", "queue": 0, "chains": [{"id": 1, "descriptors": 2}]}"#,
            )
            .unwrap(),
        ]);
        let model = cpu::model::tests::sample();
        let vcpu = cpu::vcpu::tests::sample();
        let spec = Config {
            kernel: Some("/k".into()),
            disks: vec!["path=/d".parse().unwrap()],
            nets: vec!["switch=lan,mac=52:54:00:12:34:56".parse().unwrap()],
            pfs: vec!["net,vfs=2,mac=52:54:00:12:35:00".parse().unwrap()],
            ..Config::default()
        };
        let mut state = State::of(Parts {
            id: SnapshotId([7; 16]),
            digest: Digest([9; 32]),
            machine: Machine::of(&spec.resolve().unwrap()),
            cpu: &state::State {
                irqchip: irqchip::tests::sample(),
                clock: clock::tests::sample(),
                vcpus: vec![vcpu],
            },
            model: &model,
            pci: Pci::of(&pci::tests::sample()),
            functions: vec![
                Function::of("console0", context, &function::tests::sample()),
                Function::of("disk0", Context::default(), &Default::default()),
            ],
            owners: vec![Owner::of("pf0", &owner::tests::sample())],
            serial: Serial::of(&serial::tests::sample(), b"ls\n"),
        });
        // The same each time, and everywhere.
        state.created.by = "tern 0.1.0".to_owned();
        state.created.at = "2026-11-28T15:00:00Z".to_owned();
        state
    }

    #[test]
    fn the_document_is_the_same_after_json() {
        let text = write(&sample()).unwrap();
        assert_eq!(
            parse(&text),
            Ok(sample()),
            "{}",
            String::from_utf8_lossy(&text)
        );
    }

    /// Bytes and values of the JSON of `value`, as in a document.
    fn measure(value: &impl Serialize) -> (usize, u64) {
        fn values(value: &serde_json::Value) -> u64 {
            use serde_json::Value::{Array, Object};
            1 + match value {
                Array(entries) => entries.iter().map(values).sum(),
                Object(members) => members.values().map(values).sum(),
                _ => 0,
            }
        }
        let compact = serde_json::to_vec(value).unwrap();
        let text = super::super::layout::lay_out(&compact);
        (text.len(), values(&serde_json::to_value(value).unwrap()))
    }

    #[test]
    fn the_largest_machine_is_within_half_the_limits() {
        let state = sample();
        let mut vcpu = state.vcpus[0].clone();
        // With the tile registers of AMX, and more registers than KVM lists on any processor.
        vcpu.xsave.0.resize(11 << 10, 0xff);
        let msr = vcpu.msrs[0];
        vcpu.msrs.resize(400, msr);
        // Three queues, every descriptor of which is in flight, and configuration space without a line of zeroes.
        let buffer = OwnedBuffer {
            address: u64::MAX,
            len: u32::MAX,
            kind: OwnedKind::Writable,
        };
        let chain = OwnedChain {
            id: u16::MAX,
            descriptors: 1,
            buffers: vec![buffer],
        };
        let queue = QueueState {
            size: 256,
            vector: 1,
            descriptor_area: u64::MAX,
            driver_area: u64::MAX,
            device_area: u64::MAX,
            enabled: true,
            stopped: true,
            restarts: true,
            ring: RingState::Packed(PackedState {
                next_available: Position::from_raw(u16::MAX),
                next_used: Position::from_raw(u16::MAX),
                owned: vec![chain; 256],
            }),
        };
        let function = FunctionState {
            offered: u128::MAX,
            accepted: u128::MAX,
            registers: RegisterState::default(),
            queues: vec![queue; 3],
            config: vec![0xff; 64],
        };
        let shape = Shape {
            queue_sizes: vec![256; 3],
            config_len: 64,
            queue_status: true,
            packed: false,
        };
        let context = Context::of_state(&function, &shape);
        let function = Function::of("pf0-vf255", context, &function::tests::sample());
        let mut pci = pci::tests::sample();
        pci.functions[1].registers.config = vec![0xff; 4096];
        let registers = Pci::of(&pci).functions.remove(1);
        let (mut bytes, mut count) = (0, 0);
        for (times, (len, values)) in [
            (254, measure(&vcpu)),
            (2 * 255, measure(&function)),
            (2 * 255, measure(&registers)),
        ] {
            bytes += times * len;
            count += times as u64 * values;
        }
        let most = (document::MAX_LEN / 2, document::MAX_VALUES / 2);
        assert!(bytes < most.0 && count < most.1, "{bytes} {count}");
    }

    /// A change, and why what it leaves is refused.
    type Case = (fn(&mut State), &'static str);

    #[test]
    fn values_out_of_range_have_their_whole_path() {
        let cases: [Case; 5] = [
            (
                |s| s.pci.functions[0].config.length = 5000,
                "pci.functions[0].config.length: 5000 is more than 4096",
            ),
            (
                |s| s.pci.functions[1].msix.as_mut().unwrap().entries[1].address = Hex(1),
                "pci.functions[1].msix.entries[1].address: 0x1 is no multiple of 4",
            ),
            (
                |s| {
                    s.functions[1].context.0 = vec![Field::Raw(Raw {
                        kind: Hex(0),
                        reserved: Some(Hex(u64::MAX)),
                        value: HexBytes::default(),
                    })]
                },
                "functions[1].context[0].reserved: 0xffffffffffffffff is more than 0xffffffffffff, the most in 6 bytes",
            ),
            (
                |s| s.owners[0].sessions[0].members.reverse(),
                "owners[0].sessions[0].members[1]: 1 follows 7; the list ascends",
            ),
            (
                |s| s.serial.receive_fifo = HexBytes(vec![0; 65]),
                "serial.receive_fifo: 65 bytes are more than 64",
            ),
        ];
        for (change, expected) in cases {
            let mut sections = sample();
            change(&mut sections);
            let text = serde_json::to_vec(&sections).unwrap();
            assert_eq!(parse::<State>(&text).unwrap_err().to_string(), expected);
            assert_eq!(write(&sections).unwrap_err().to_string(), expected);
        }
    }
}
