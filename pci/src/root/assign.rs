//! What firmware does before an operating system starts: bus numbers, bridge windows, BAR addresses.
//!
//! Endpoints are left with decoding disabled, ports with their windows open, so that an operating system finds every
//! resource assigned and has no reason to move any.

use std::ops::Range;
use std::sync::Arc;

use super::{Occupant, PciRoot};
use crate::bar::BarKind;
use crate::function::{PciFunction, Resource};
use crate::root_port::{RootPort, Windows};
use crate::topology::{BusNumber, WINDOW_ALIGN};

/// Why resources cannot be assigned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// A memory window is too small for what the functions need.
    #[error("the PCI memory window {window:#x?} is full; use fewer devices or virtual functions")]
    WindowFull {
        /// The window.
        window: Range<u64>,
    },
    /// There are more buses than ECAM has room for.
    #[error("there are more PCI buses than the {0} that have configuration space")]
    NoBus(u16),
}

/// A resource that goes into one of the two host windows.
struct Claim {
    kind: BarKind,
    size: u64,
    align: u64,
    what: What,
}

enum What {
    Bar(Arc<dyn PciFunction>, Resource),
    /// The window of port number `.0` in the list of ports, for these.
    Window(usize, Vec<(Arc<dyn PciFunction>, Resource)>),
}

/// Gives out addresses, ascending.
struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    fn take(&mut self, size: u64, align: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(align)?;
        let end = start.checked_add(size).filter(|end| *end <= self.end)?;
        self.next = end;
        Some(start)
    }
}

impl PciRoot {
    /// Gives every bus a number and every BAR and bridge window an address. To be called once all functions are
    /// plugged in and before the guest runs; calling it again gives the same result.
    pub fn assign_resources(&self) -> Result<(), AssignError> {
        let occupants: Vec<_> = self.bus().values().cloned().collect();
        let mut claims = Vec::new();
        let mut ports: Vec<(Arc<RootPort>, Windows)> = Vec::new();
        for occupant in &occupants {
            match occupant {
                Occupant::HostBridge(_) => {}
                Occupant::Endpoint(function) => {
                    claims.extend(function.resources().into_iter().map(|resource| Claim {
                        kind: resource.kind,
                        size: resource.size,
                        align: resource.align,
                        what: What::Bar(Arc::clone(function), resource),
                    }));
                }
                Occupant::Port(port) => {
                    for kind in [BarKind::Memory32, BarKind::Prefetchable64] {
                        claims.extend(window_claim(port, ports.len(), kind));
                    }
                    let closed = Windows {
                        memory: 0..0,
                        prefetchable: 0..0,
                    };
                    ports.push((Arc::clone(port), closed));
                }
            }
        }
        // Largest alignment first, so that nothing is lost between them. The sort is stable: same order every time.
        claims.sort_by_key(|claim| std::cmp::Reverse(claim.align));
        let mut low = Cursor::over(&self.layout.mmio32);
        let mut high = Cursor::over(&self.layout.mmio64);
        let only_low = self.layout.mmio64.is_empty();
        for claim in claims {
            let (cursor, window) = match claim.kind {
                BarKind::Prefetchable64 if !only_low => (&mut high, &self.layout.mmio64),
                _ => (&mut low, &self.layout.mmio32),
            };
            let full = || AssignError::WindowFull {
                window: window.clone(),
            };
            let start = cursor.take(claim.size, claim.align).ok_or_else(full)?;
            match claim.what {
                What::Bar(function, resource) => function.assign(resource.slot, start),
                What::Window(port, resources) => {
                    let range = start..start + claim.size;
                    let mut inside = Cursor::over(&range);
                    for (function, resource) in resources {
                        let address = inside.take(resource.size, resource.align);
                        function.assign(resource.slot, address.ok_or_else(full)?);
                    }
                    if let Some((_, windows)) = ports.get_mut(port) {
                        match claim.kind {
                            BarKind::Memory32 => windows.memory = range,
                            BarKind::Prefetchable64 => windows.prefetchable = range,
                        }
                    }
                }
            }
        }
        let last = self.layout.last_bus();
        for (index, (port, windows)) in ports.iter().enumerate() {
            let number = u8::try_from(index + 1).ok().filter(|n| *n <= last.0);
            let number = number.ok_or(AssignError::NoBus(u16::from(last.0) + 1))?;
            port.assign(BusNumber(number), windows);
        }
        self.refresh();
        Ok(())
    }
}

impl Cursor {
    fn over(range: &Range<u64>) -> Self {
        Self {
            next: range.start,
            end: range.end,
        }
    }
}

/// The window of `port` for all resources of `kind` behind it.
fn window_claim(port: &RootPort, index: usize, kind: BarKind) -> Option<Claim> {
    let mut resources: Vec<_> = port
        .children()
        .functions()
        .into_iter()
        .flat_map(|function| {
            let resources = function.resources();
            resources
                .into_iter()
                .map(move |resource| (Arc::clone(&function), resource))
        })
        .filter(|(_, resource)| resource.kind == kind)
        .collect();
    resources.sort_by_key(|(_, resource)| std::cmp::Reverse(resource.align));
    let align = resources.first()?.1.align.max(WINDOW_ALIGN);
    let mut cursor = Cursor {
        next: 0,
        end: u64::MAX,
    };
    let fits = resources
        .iter()
        .all(|(_, resource)| cursor.take(resource.size, resource.align).is_some());
    // What does not fit into 64 bits fits into no window either, and is reported as that.
    let size = cursor.next.checked_next_multiple_of(WINDOW_ALIGN);
    Some(Claim {
        kind,
        size: size.filter(|_| fits).unwrap_or(u64::MAX),
        align,
        what: What::Window(index, resources),
    })
}
