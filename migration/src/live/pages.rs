//! Guest memory to frames and back.

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

/// Which pages need not be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// The destination has zeroes everywhere: pages that nothing was ever written to are left out.
    First,
    /// It has older contents.
    Later,
}

/// Sends `pages` of `guest`. `tick` is called now and then, with the number of pages dealt with; it may end the round.
pub fn send<G: GuestPages + ?Sized>(
    connection: &mut Connection,
    guest: &G,
    pages: &PageSet,
    round: Round,
    mut tick: impl FnMut(u64) -> Result<(), WireError>,
) -> Result<Sent, WireError> {
    let mut batch = Batch {
        connection,
        guest,
        round,
        data: PageTable::default(),
        zeroes: PageTable::default(),
        sent: Sent::default(),
    };
    let mut done = 0;
    for run in pages.runs() {
        for (offset, len) in pieces(guest, &run, round) {
            let Some(piece) = Piece::new(guest, run.range, offset, len) else {
                continue;
            };
            let first = run.first + (offset - run.offset) / PAGE_SIZE;
            for index in 0..len / PAGE_SIZE {
                batch.add(
                    first + index,
                    &piece,
                    index * PAGE_SIZE,
                    offset == 0 && index == 0,
                )?;
                if index % MAX_PAGES as u64 == 0 {
                    tick(done + first + index - run.first)?;
                }
            }
        }
        done += run.count;
        tick(done)?;
    }
    batch.flush()
}

/// Offset and length of the pieces of `run` to look at.
pub(super) fn pieces<G: GuestPages + ?Sized>(
    guest: &G,
    run: &Run,
    round: Round,
) -> Vec<(u64, u64)> {
    let end = run.offset + run.bytes();
    if round == Round::Later {
        return vec![(run.offset, run.bytes())];
    }
    let mut pieces = Vec::new();
    let mut at = run.offset;
    while let Some(piece) = guest
        .occupied(run.range, at)
        .filter(|piece| piece.start < end)
    {
        let start = (piece.start.max(at)) / PAGE_SIZE * PAGE_SIZE;
        let stop = piece.end.min(end).next_multiple_of(PAGE_SIZE);
        pieces.push((start, stop - start));
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

/// Pages that arrive.
#[derive(Debug)]
pub struct Arriving {
    /// Pages whose contents do not match their checksums: the guest wrote them while they were sent, or they were damaged.
    /// Unless they are sent again, the guest is lost.
    torn: PageSet,
    /// Range number and offset of the last large page that the guest's memory was given.
    enlarged: Option<(usize, u64)>,
}

impl Arriving {
    /// None yet.
    pub fn new(layout: &RamLayout) -> Self {
        Self {
            torn: PageSet::empty(layout),
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
    ) -> Result<u64, WireError> {
        let table = PageTable::parse(Kind::Pages, body, guest.layout())?;
        let pieces = locate(guest, Kind::Pages, &table)?;
        self.enlarge(guest, &pieces);
        connection.read_pages(&pieces)?;
        let mut sums = table.sums.iter();
        for ((first, count), piece) in table.runs.iter().zip(&pieces) {
            for index in 0..u64::from(*count) {
                if piece.checksum(index * PAGE_SIZE).as_ref() == sums.next() {
                    self.torn.remove_run(first + index, 1);
                } else {
                    self.torn.insert(first + index);
                }
            }
        }
        Ok(table.pages())
    }

    /// Clears the pages of a [`Kind::Zeroes`] frame.
    pub fn zeroes<G: GuestPages + ?Sized>(
        &mut self,
        guest: &G,
        body: &[u8],
    ) -> Result<u64, WireError> {
        let table = PageTable::parse(Kind::Zeroes, body, guest.layout())?;
        for ((first, count), piece) in table.runs.iter().zip(locate(guest, Kind::Zeroes, &table)?) {
            piece.clear();
            self.torn.remove_run(*first, (*count).into());
        }
        Ok(table.pages())
    }

    /// Number of the first page that is not what the source has.
    pub fn first_torn(&self) -> Option<u64> {
        self.torn.runs().next().map(|run| run.first)
    }
}
