//! What the VMM implements so that its guest can be moved.

use crate::guest::GuestPages;
use crate::pages::PageSet;
use crate::wire::connection::{Named, Section};

/// Error of a guest's side, with its sources.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// A guest that is to leave. Its methods are called in the order they stand here, each once unless it says otherwise; after
/// any failure before the commit, [`resume`](Self::resume) is the last call.
pub trait SourceGuest {
    /// Its memory.
    type Memory: GuestPages + ?Sized;

    /// Its memory.
    fn memory(&self) -> &Self::Memory;

    /// Everything the destination needs to build the machine and to say whether it can run the guest.
    fn offer(&mut self) -> Result<Vec<Section>, GuestError>;

    /// Open files that are handed over: memory (`memory`), disks, taps. Only asked for where the connection can pass them.
    fn descriptors(&mut self) -> Result<Vec<Named>, GuestError>;

    /// Begins to track writes to memory. All pages count as written. Only for a migration that copies.
    fn track(&mut self) -> Result<(), GuestError>;

    /// State that can be read while the guest runs, for the destination to check and prepare. Only for a migration that
    /// copies, after the first round.
    fn early(&mut self) -> Result<Vec<Section>, GuestError>;

    /// Pages that were written since the last call. Called for each round, and after [`state`](Self::state).
    fn written(&mut self) -> Result<PageSet, GuestError>;

    /// Has the guest stand still for `percent` of the time. Called as often as it takes.
    fn slow_down(&mut self, percent: u8);

    /// Stops the guest: nothing of it happens any more.
    fn stop(&mut self) -> Result<(), GuestError>;

    /// The state of the stopped guest, but for its memory.
    fn state(&mut self) -> Result<Vec<Section>, GuestError>;

    /// Lets go of what only one process may hold, right before the commit.
    fn release(&mut self);

    /// The guest stays: takes back what was released and lets it go on, if it ran, at full speed. It may never have been
    /// stopped, tracked or offered.
    ///
    /// # Errors
    ///
    /// It cannot go on, since somebody else took what was released.
    fn resume(&mut self) -> Result<(), GuestError>;
}

/// A guest that is to arrive. Dropped before it runs, it leaves no trace.
pub trait DestinationGuest {
    /// Its memory.
    type Memory: GuestPages + ?Sized;

    /// Its memory: zeroes, if it is copied.
    fn memory(&self) -> &Self::Memory;

    /// State that was read while the guest ran. What is wrong with it is wrong with all of the migration. The source decides
    /// how often, and with what.
    fn early(&mut self, section: Section) -> Result<(), GuestError>;

    /// Puts the guest into its state and verifies that nothing is missing. Nothing of it runs yet.
    fn restore(&mut self, sections: Vec<Section>) -> Result<(), GuestError>;
}
