//! The two kinds of rings behind one face.

use super::packed::{Descriptors, PackedRing, Position};
use super::split::SplitRing;
use super::{QueueRegisters, RingError};
use crate::memory::View;
use crate::state::{PackedState, RingState, SplitState};
use crate::virtio::chain::{Chain, Ticket};

/// Which kind of ring a driver uses: it accepted VIRTIO_F_RING_PACKED or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    /// Split.
    #[default]
    Split,
    /// Packed.
    Packed,
}

impl Format {
    /// True if a ring of this kind can have `size` entries.
    pub fn allows(self, size: u16) -> bool {
        match self {
            Self::Split => size.is_power_of_two(),
            Self::Packed => (1..=32768).contains(&size),
        }
    }

    /// Where a ring starts if its driver does not say it.
    pub(super) fn start(self) -> Start {
        match self {
            Self::Split => Start::default(),
            Self::Packed => Start::at(Position::START.raw()),
        }
    }
}

/// Where a ring is to go on, in the encoding of its format: indices modulo 2^16, or offsets and wrap counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Start {
    /// What is fetched next.
    pub available: u16,
    /// What is used next. That of a split ring is in its used ring instead (G0-l).
    pub used: u16,
}

impl Start {
    /// At a place at which nothing is in flight.
    pub fn at(place: u16) -> Self {
        Self {
            available: place,
            used: place,
        }
    }
}

/// A chain that the function has, and what it takes to fetch it again.
#[derive(Debug)]
pub(super) struct Held {
    pub ticket: Ticket,
    /// `None` for a chain of a split ring, whose descriptors nobody overwrites.
    descriptors: Option<Descriptors>,
}

/// The rings of an enabled queue.
#[derive(Debug)]
pub(super) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    /// The rings that `registers` describe, at their start, if all of them is guest memory.
    pub fn new(
        format: Format,
        max_size: u16,
        registers: &QueueRegisters,
        view: &View,
    ) -> Result<Self, RingError> {
        Ok(match format {
            Format::Split => Self::Split(SplitRing::new(max_size, registers, view)?),
            Format::Packed => Self::Packed(PackedRing::new(registers, view)?),
        })
    }

    /// Goes on where `saved` says, and the chains that the function has.
    pub fn restore(&mut self, saved: &RingState, view: &View) -> Result<Vec<Held>, RingError> {
        match (self, saved) {
            (Self::Split(ring), RingState::Split(saved)) => {
                ring.go_to(saved.next_available, saved.next_used);
                let held = saved.owned.iter().map(|head| Held {
                    ticket: SplitRing::ticket(*head),
                    descriptors: None,
                });
                Ok(held.collect())
            }
            (Self::Packed(ring), RingState::Packed(saved)) => {
                ring.go_to(saved.next_available, saved.next_used)?;
                let held = saved.owned.iter().map(|chain| {
                    Ok(Held {
                        ticket: Ticket {
                            id: chain.id,
                            slots: chain.descriptors,
                        },
                        descriptors: Some(Descriptors::restored(chain, view)?),
                    })
                });
                held.collect()
            }
            _ => Err(RingError::Format),
        }
    }

    /// Where the ring is, with `held`, the chains that the function has.
    pub fn save<'a>(&self, held: impl Iterator<Item = &'a Held>) -> RingState {
        match self {
            Self::Split(ring) => RingState::Split(SplitState {
                next_available: ring.next_available(),
                next_used: ring.next_used(),
                owned: held.map(|held| held.ticket.id).collect(),
            }),
            Self::Packed(ring) => RingState::Packed(PackedState {
                next_available: ring.next_available(),
                next_used: ring.next_used(),
                owned: held
                    .filter_map(|held| Some(held.descriptors.as_ref()?.save(held.ticket)))
                    .collect(),
            }),
        }
    }

    /// Where the ring is, in the encoding of its format.
    pub fn place(&self) -> Start {
        match self {
            Self::Split(ring) => Start {
                available: ring.next_available(),
                used: ring.next_used(),
            },
            Self::Packed(ring) => Start {
                available: ring.next_available().raw(),
                used: ring.next_used().raw(),
            },
        }
    }

    /// Goes on where the driver says.
    pub fn start_at(&mut self, view: &View, start: Start) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.go_to_available(view, start.available),
            Self::Packed(ring) => {
                // Nothing is in flight where a driver says it, so that there is nothing between the two.
                if start.available != start.used {
                    return Err(RingError::Position(start.used));
                }
                let place = Position::from_raw(start.available);
                ring.go_to(place, place)
            }
        }
    }

    /// Whether what the driver is notified of depends on events.
    pub fn set_event_index(&mut self, enabled: bool) {
        match self {
            Self::Split(ring) => ring.set_event_index(enabled),
            Self::Packed(ring) => ring.set_event_index(enabled),
        }
    }

    /// Fetches the next available chain, unless it is one of `held`.
    pub fn next<'a>(
        &mut self,
        view: &View,
        mut held: impl Iterator<Item = &'a Held>,
    ) -> Result<Option<(Chain, Held)>, RingError> {
        Ok(match self {
            Self::Split(ring) => {
                let chain = ring.next(view, |ticket| held.any(|held| held.ticket == ticket))?;
                chain.map(|chain| {
                    let ticket = chain.ticket();
                    let descriptors = None;
                    (
                        chain,
                        Held {
                            ticket,
                            descriptors,
                        },
                    )
                })
            }
            Self::Packed(ring) => {
                let found = ring.next(view, |id| held.any(|held| held.ticket.id == id))?;
                found.map(|(chain, descriptors)| {
                    let ticket = chain.ticket();
                    let descriptors = Some(descriptors);
                    (
                        chain,
                        Held {
                            ticket,
                            descriptors,
                        },
                    )
                })
            }
        })
    }

    /// Fetches a chain that the function has, once more.
    pub fn again(&mut self, view: &View, held: &Held) -> Result<Chain, RingError> {
        match (self, &held.descriptors) {
            (Self::Split(ring), None) => ring.again(view, held.ticket),
            (Self::Packed(ring), Some(descriptors)) => ring.again(view, held.ticket, descriptors),
            _ => Err(RingError::Format),
        }
    }

    /// The chain that was fetched last is as if it had not been.
    pub fn put_back(&mut self, ticket: Ticket) {
        match self {
            Self::Split(ring) => ring.put_back(),
            Self::Packed(ring) => ring.put_back(ticket),
        }
    }

    /// Returns chains to the driver, with so many bytes written. It sees all of them or none.
    pub fn push(
        &mut self,
        view: &View,
        used: impl Iterator<Item = (Ticket, u32)>,
    ) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.push(view, used),
            Self::Packed(ring) => ring.push(view, used),
        }
    }

    /// Tells the driver not to kick.
    pub fn disable_kicks(&mut self, view: &View) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.disable_kicks(view),
            Self::Packed(ring) => ring.disable_kicks(view),
        }
    }

    /// True if the device found the ring empty since kicks were last asked for, or declined.
    pub fn is_starved(&self) -> bool {
        match self {
            Self::Split(ring) => ring.is_starved(),
            Self::Packed(ring) => ring.is_starved(),
        }
    }

    /// Asks for a kick when the next chain is made available. True if one already is.
    pub fn enable_kicks(&mut self, view: &View) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.enable_kicks(view),
            Self::Packed(ring) => ring.enable_kicks(view),
        }
    }

    /// Whether the driver wants to hear of what was used since it was last asked this.
    pub fn wants_signal(&mut self, view: &View) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.wants_signal(view),
            Self::Packed(ring) => ring.wants_signal(view),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::testing::ram;

    const SIZE: u16 = 8;
    const RING: u64 = 0x1000;
    const DRIVER: u64 = 0x2000;
    const DEVICE: u64 = 0x3000;

    /// Rings of one kind, and the six chains of one descriptor that were fetched from them.
    fn fetched(format: Format) -> (View, Ring, Vec<Ticket>) {
        let view = ram().view().unwrap();
        let registers = QueueRegisters {
            size: SIZE,
            descriptor_area: RING,
            driver_area: DRIVER,
            device_area: DEVICE,
        };
        let mut ring = Ring::new(format, SIZE, &registers, &view).unwrap();
        let write = |at: u64, bytes: &[u8]| view.write_slice(bytes, GuestAddress(at)).unwrap();
        for index in 0..6u16 {
            let at = RING + 16 * u64::from(index);
            write(at, &0x8000u64.to_le_bytes());
            write(at + 8, &1u32.to_le_bytes());
            let (third, fourth) = match format {
                Format::Split => (0, 0),
                // Its buffer id, and that it is available in the first round.
                Format::Packed => (index, 1u16 << 7),
            };
            write(
                at + 12,
                &[third.to_le_bytes(), fourth.to_le_bytes()].concat(),
            );
            write(DRIVER + 4 + 2 * u64::from(index), &index.to_le_bytes());
        }
        if format == Format::Split {
            write(DRIVER + 2, &6u16.to_le_bytes());
        }
        let next = |_| ring.next(&view, [].iter()).unwrap().unwrap().0.ticket();
        let tickets = (0..6).map(next).collect();
        (view, ring, tickets)
    }

    /// How many chains the driver can take back.
    fn used(format: Format, view: &View) -> u16 {
        let word = |at: u64| view.read_obj::<u16>(GuestAddress(at)).unwrap();
        match format {
            Format::Split => word(DEVICE + 2),
            Format::Packed => {
                // It does not look beyond the first that is not used.
                let flags = |index: u16| word(RING + 16 * u64::from(index) + 14);
                let is_used = |index: &u16| flags(*index) & (1 << 7 | 1 << 15) == 1 << 7 | 1 << 15;
                (0..SIZE).take_while(is_used).count() as u16
            }
        }
    }

    /// Requirements: ring
    #[test]
    fn ring_chains_that_are_returned_together_are_seen_together() {
        for format in [Format::Split, Format::Packed] {
            let (view, mut ring, tickets) = fetched(format);
            let (first, rest) = tickets.split_at(2);
            for (tickets, before) in [(first, 0), (rest, 2)] {
                let looks = tickets.iter().map(|ticket| {
                    assert_eq!(used(format, &view), before, "{format:?}");
                    (*ticket, 1)
                });
                ring.push(&view, looks).unwrap();
                assert_eq!(used(format, &view), before + tickets.len() as u16);
            }
            ring.push(&view, std::iter::empty()).unwrap();
            assert_eq!(used(format, &view), 6);
        }
    }

    #[test]
    fn chains_that_are_put_back_are_fetched_again() {
        for format in [Format::Split, Format::Packed] {
            let (view, mut ring, tickets) = fetched(format);
            let next = |ring: &mut Ring| {
                let found = ring.next(&view, [].iter()).unwrap();
                found.map(|(chain, _)| chain.ticket())
            };
            assert_eq!(next(&mut ring), None, "{format:?}");
            for ticket in tickets.iter().rev().take(3) {
                ring.put_back(*ticket);
            }
            for ticket in tickets.iter().skip(3) {
                assert_eq!(next(&mut ring), Some(*ticket), "{format:?}");
            }
            assert_eq!(next(&mut ring), None);
        }
    }

    #[test]
    fn a_driver_is_told_whether_kicks_are_of_use() {
        for (format, at) in [(Format::Split, DEVICE), (Format::Packed, DEVICE + 2)] {
            let (view, mut ring, _) = fetched(format);
            let flags = || view.read_obj::<u16>(GuestAddress(at)).unwrap();
            ring.disable_kicks(&view).unwrap();
            assert_eq!(flags(), 1, "{format:?}");
            assert!(!ring.enable_kicks(&view).unwrap());
            assert_eq!(flags(), 0, "{format:?}");
        }
    }

    #[test]
    fn a_used_descriptor_of_a_packed_ring_says_whether_something_was_written() {
        let (view, mut ring, tickets) = fetched(Format::Packed);
        let used = tickets.into_iter().zip([0, 7]);
        ring.push(&view, used).unwrap();
        let tail = |index: u64| view.read_obj::<[u16; 4]>(GuestAddress(RING + 16 * index + 8));
        // Length, buffer id, flags.
        assert_eq!(tail(0).unwrap(), [0, 0, 0, 0x8080]);
        assert_eq!(tail(1).unwrap(), [7, 0, 1, 0x8082]);
    }

    #[test]
    fn positions_come_in_a_circle_of_two_rounds() {
        for size in [1u16, 2, 3, 7, 32768] {
            let whole = 2 * u32::from(size);
            for step in [0, 1, size / 2, size - 1, size] {
                let mut at = Position::START;
                for turn in 1..=9u32 {
                    let next = at.ahead(step, size);
                    assert_eq!(next.back(step, size), at, "{size} {step}");
                    assert_eq!(at.distance(next, size), u32::from(step) % whole);
                    at = next;
                    let from_start = Position::START.distance(at, size);
                    assert_eq!(from_start, turn * u32::from(step) % whole);
                    assert!(at.offset() < size);
                    assert_eq!(at.wrap(), from_start < u32::from(size));
                }
            }
        }
    }
}
