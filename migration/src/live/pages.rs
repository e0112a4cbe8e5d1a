//! Guest memory to frames and back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::guest::{GuestPages, Piece};
use crate::layout::{LARGE_PAGE, PAGE_SIZE, RamLayout};
use crate::pages::{PageSet, Run};
use crate::wire::WireError;
use crate::wire::connection::Connection;
use crate::wire::frame::{Kind, MAX_PAGES, PageTable, run_in_range};

/// Pages of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages with their contents.
    pub data: u64,
    /// Pages that were all zero.
    pub zero: u64,
}

impl std::ops::AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        self.data += other.data;
        self.zero += other.zero;
    }
}

/// Which pages need not be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// The destination has zeroes everywhere: pages that nothing was ever written to are left out.
    First,
    /// It has older contents.
    Later,
}

/// What one connection takes at a time, in bytes of guest memory: what is in one large page is sent over one connection, in
/// the frames it would be sent in if there were no other.
pub const CHUNK: u64 = LARGE_PAGE;

/// Pages that are to be sent, for the connections that share them.
pub struct Pending<'a, G: ?Sized> {
    guest: &'a G,
    round: Round,
    left: Mutex<Left<'a>>,
    done: AtomicU64,
}

/// Pages that no connection has taken yet.
struct Left<'a> {
    runs: Box<dyn Iterator<Item = Run> + Send + 'a>,
    /// Those of a run to look at.
    pieces: std::vec::IntoIter<Run>,
    /// The rest of a piece of which a part was taken.
    rest: Option<Run>,
    given_up: bool,
}

impl<'a, G: GuestPages + ?Sized> Pending<'a, G> {
    /// The pages of `guest` that are in `pages`.
    pub fn new(guest: &'a G, pages: &'a PageSet, round: Round) -> Self {
        Self {
            guest,
            round,
            left: Mutex::new(Left {
                runs: Box::new(pages.runs()),
                pieces: Vec::new().into_iter(),
                rest: None,
                given_up: false,
            }),
            done: AtomicU64::new(0),
        }
    }

    /// Number of pages dealt with.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends all who send them, with an error.
    pub fn give_up(&self) {
        self.lock().given_up = true;
    }

    fn lock(&self) -> MutexGuard<'_, Left<'a>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece to look at.
    fn piece(&self, left: &mut Left<'_>) -> Option<Run> {
        loop {
            if let Some(piece) = left.rest.take().or_else(|| left.pieces.next()) {
                return Some(piece);
            }
            let run = left.runs.next()?;
            let pieces = pieces(self.guest, &run, self.round);
            let looked_at: u64 = pieces.iter().map(|piece| piece.count).sum();
            self.done
                .fetch_add(run.count.saturating_sub(looked_at), Ordering::Relaxed);
            left.pieces = pieces.into_iter();
        }
    }

    /// Takes the next pages, all in one [`CHUNK`]; none if none are left.
    fn take(&self) -> Result<Vec<Run>, WireError> {
        let mut left = self.lock();
        if left.given_up {
            return Err(WireError::Closed);
        }
        let mut taken: Vec<Run> = Vec::new();
        while let Some(mut piece) = self.piece(&mut left) {
            let place = |run: &Run| (run.range, run.offset / CHUNK);
            if taken
                .first()
                .is_some_and(|first| place(first) != place(&piece))
            {
                left.rest = Some(piece);
                break;
            }
            let count = piece.count.min((CHUNK - piece.offset % CHUNK) / PAGE_SIZE);
            if count < piece.count {
                left.rest = Some(Run {
                    offset: piece.offset + count * PAGE_SIZE,
                    first: piece.first + count,
                    count: piece.count - count,
                    ..piece
                });
                piece.count = count;
            }
            taken.push(piece);
        }
        Ok(taken)
    }
}

/// Sends pages over one connection until none of them are left. `tick` is called now and then, and may end it.
pub fn send<G: GuestPages + ?Sized>(
    connection: &mut Connection,
    pending: &Pending<'_, G>,
    mut tick: impl FnMut() -> Result<(), WireError>,
) -> Result<Sent, WireError> {
    let guest = pending.guest;
    let mut batch = Batch {
        connection,
        guest,
        round: pending.round,
        data: PageTable::default(),
        zeroes: PageTable::default(),
        sent: Sent::default(),
    };
    loop {
        let taken = pending.take()?;
        if taken.is_empty() {
            return batch.flush();
        }
        for run in taken {
            if let Some(piece) = Piece::new(guest, run.range, run.offset, run.bytes()) {
                for index in 0..run.count {
                    let starts_range = run.offset == 0 && index == 0;
                    batch.add(run.first + index, &piece, index * PAGE_SIZE, starts_range)?;
                }
            }
            pending.done.fetch_add(run.count, Ordering::Relaxed);
        }
        tick()?;
    }
}

/// The pieces of `run` to look at.
pub(super) fn pieces<G: GuestPages + ?Sized>(guest: &G, run: &Run, round: Round) -> Vec<Run> {
    if round == Round::Later {
        return vec![*run];
    }
    let end = run.offset + run.bytes();
    let mut pieces = Vec::new();
    let mut at = run.offset;
    while let Some(piece) = guest
        .occupied(run.range, at)
        .filter(|piece| piece.start < end)
    {
        let start = (piece.start.max(at)) / PAGE_SIZE * PAGE_SIZE;
        let stop = piece.end.min(end).next_multiple_of(PAGE_SIZE);
        pieces.push(Run {
            range: run.range,
            offset: start,
            first: run.first + (start - run.offset) / PAGE_SIZE,
            count: (stop - start) / PAGE_SIZE,
        });
        at = stop;
    }
    pieces
}

/// Pages on their way into frames.
struct Batch<'a, G: ?Sized> {
    connection: &'a mut Connection,
    guest: &'a G,
    round: Round,
    data: PageTable,
    zeroes: PageTable,
    sent: Sent,
}

impl<G: GuestPages + ?Sized> Batch<'_, G> {
    fn add(
        &mut self,
        page: u64,
        piece: &Piece<'_, G>,
        offset: u64,
        starts_range: bool,
    ) -> Result<(), WireError> {
        if piece.is_zero(offset) {
            self.sent.zero += 1;
            if self.round == Round::First {
                return Ok(());
            }
            if !self.zeroes.push(page, starts_range) {
                self.flush_zeroes()?;
                self.zeroes.push(page, starts_range);
            }
            return Ok(());
        }
        let Some(sum) = piece.checksum(offset) else {
            return Ok(());
        };
        // So that the destination sees at once what fills most of a large page.
        let begins_large_page = piece.at(offset).is_multiple_of(LARGE_PAGE);
        if self.data.sums.len() >= MAX_PAGES
            || begins_large_page && self.data.sums.len() >= MAX_PAGES / 2
            || !self.data.push(page, starts_range)
        {
            self.flush_data()?;
            self.data.push(page, starts_range);
        }
        self.data.sums.push(sum);
        self.sent.data += 1;
        Ok(())
    }

    fn flush_zeroes(&mut self) -> Result<(), WireError> {
        let table = std::mem::take(&mut self.zeroes);
        if table.runs.is_empty() {
            return Ok(());
        }
        self.connection.send_zeroes(&table)
    }

    fn flush_data(&mut self) -> Result<(), WireError> {
        let table = std::mem::take(&mut self.data);
        if table.runs.is_empty() {
            return Ok(());
        }
        let pieces = locate(self.guest, Kind::Pages, &table)?;
        self.connection.send_pages(&table, &pieces)
    }

    fn flush(mut self) -> Result<Sent, WireError> {
        self.flush_zeroes()?;
        self.flush_data()?;
        Ok(self.sent)
    }
}

/// The memory of each run of `table`.
pub(super) fn locate<'g, G: GuestPages + ?Sized>(
    guest: &'g G,
    kind: Kind,
    table: &PageTable,
) -> Result<Vec<Piece<'g, G>>, WireError> {
    let runs = table.runs.iter();
    let pieces = runs.map(|(first, count)| {
        let (range, offset) = run_in_range(guest.layout(), *first, *count)?;
        Piece::new(guest, range, offset, u64::from(*count) * PAGE_SIZE)
    });
    pieces
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| WireError::malformed(kind, "its pages are not the guest's"))
}

/// Pages that arrive over one connection. Its clones are for the other ones.
#[derive(Clone, Debug)]
pub struct Arriving {
    shared: Arc<Shared>,
    /// Range number and offset of the last large page that the guest's memory was given.
    enlarged: Option<(usize, u64)>,
}

/// What is known of the pages of all connections.
#[derive(Debug)]
struct Shared {
    /// Pages whose contents do not match their checksums: the guest wrote them while they were sent, or they were damaged.
    /// Unless they are sent again, the guest is lost.
    torn: Mutex<PageSet>,
    /// How many came.
    pages: AtomicU64,
}

impl Arriving {
    /// None yet.
    pub fn new(layout: &RamLayout) -> Self {
        Self {
            shared: Arc::new(Shared {
                torn: Mutex::new(PageSet::empty(layout)),
                pages: AtomicU64::new(0),
            }),
            enlarged: None,
        }
    }

    /// Has memory be given large pages where `pieces` are about to fill at least half of one.
    fn enlarge<G: GuestPages + ?Sized>(&mut self, guest: &G, pieces: &[Piece<'_, G>]) {
        let mut current = None;
        let mut bytes = 0;
        for piece in pieces {
            let mut offset = 0;
            while offset < piece.len() {
                let at = piece.at(offset);
                let start = at / LARGE_PAGE * LARGE_PAGE;
                let len = (start + LARGE_PAGE - at).min(piece.len() - offset);
                offset += len;
                let place = (piece.range(), start);
                bytes = if current == Some(place) { bytes } else { 0 } + len;
                current = Some(place);
                if bytes >= LARGE_PAGE / 2 && self.enlarged != current {
                    self.enlarged = current;
                    guest.enlarge(piece.range(), start..start + LARGE_PAGE);
                }
            }
        }
    }

    /// Reads the pages of a [`Kind::Pages`] frame into `guest`.
    pub fn data<G: GuestPages + ?Sized>(
        &mut self,
        connection: &mut Connection,
        guest: &G,
        body: &[u8],
    ) -> Result<(), WireError> {
        let table = PageTable::parse(Kind::Pages, body, guest.layout())?;
        let pieces = locate(guest, Kind::Pages, &table)?;
        self.enlarge(guest, &pieces);
        connection.read_pages(&pieces)?;
        let mut sums = table.sums.iter();
        let mut torn = Vec::new();
        for ((first, count), piece) in table.runs.iter().zip(&pieces) {
            for index in 0..u64::from(*count) {
                if piece.checksum(index * PAGE_SIZE).as_ref() != sums.next() {
                    torn.push(first + index);
                }
            }
        }
        self.shared.came(&table, &torn);
        Ok(())
    }

    /// Clears the pages of a [`Kind::Zeroes`] frame.
    pub fn zeroes<G: GuestPages + ?Sized>(
        &mut self,
        guest: &G,
        body: &[u8],
    ) -> Result<(), WireError> {
        let table = PageTable::parse(Kind::Zeroes, body, guest.layout())?;
        for piece in locate(guest, Kind::Zeroes, &table)? {
            piece.clear();
        }
        self.shared.came(&table, &[]);
        Ok(())
    }

    /// How many pages came, over all connections.
    pub fn pages(&self) -> u64 {
        self.shared.pages.load(Ordering::Relaxed)
    }

    /// Number of the first page that is not what the source has.
    pub fn first_torn(&self) -> Option<u64> {
        self.shared.torn().runs().next().map(|run| run.first)
    }
}

impl Shared {
    fn torn(&self) -> MutexGuard<'_, PageSet> {
        self.torn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of `table` came, and those in `torn` do not match their checksums.
    fn came(&self, table: &PageTable, torn: &[u64]) {
        let mut all = self.torn();
        for (first, count) in &table.runs {
            all.remove_run(*first, (*count).into());
        }
        for page in torn {
            all.insert(*page);
        }
        self.pages.fetch_add(table.pages(), Ordering::Relaxed);
    }
}
