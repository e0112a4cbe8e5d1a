//! What a driver asks of a disk: a total parser from chains to requests (virtio 1.4, "Block Device / Device
//! Operation").

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Parameters;
use crate::memory::View;
use crate::virtio::{Chain, RingError};

/// Bytes of a sector, the unit of the protocol whatever the block size.
pub const SECTOR: u64 = 512;
/// Length of the answer to GET_ID.
pub const ID_LEN: usize = 20;
/// Segments one DISCARD or WRITE_ZEROES may have at most.
pub const MAX_SEGMENTS: u32 = 32;
/// Sectors of one such segment at most: 1 GiB.
pub const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// The only flag of a segment: the space may be given back.
const FLAG_UNMAP: u32 = 1;

/// The device-readable header of every request.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

const HEADER_LEN: u64 = size_of::<Header>() as u64;

/// One range of a DISCARD or WRITE_ZEROES.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segment {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// The last device-writable byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or the request makes no sense.
    IoErr = 1,
    /// The device does not know this kind of request.
    Unsupported = 2,
}

/// A request that makes sense for this disk. Ranges are in bytes and lie within it.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the data buffers.
    Read(Range<u64>),
    /// Store the data buffers.
    Write(Range<u64>),
    /// Make completed writes durable.
    Flush,
    /// Say who you are.
    GetId,
    /// Forget these ranges.
    Discard(Vec<Range<u64>>),
    /// Zero these ranges; true: their space may be given back.
    WriteZeroes(Vec<(Range<u64>, bool)>),
}

/// What the parser must know of the disk.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Capacity in bytes.
    pub capacity: u64,
    /// Requests that change the disk fail.
    pub read_only: bool,
    discard: SegmentLimits,
    write_zeroes: SegmentLimits,
}

/// What the segments of one kind of request may be.
#[derive(Clone, Copy, Debug)]
struct SegmentLimits {
    /// As many of them.
    count: u32,
    /// Sectors of each.
    sectors: u32,
}

impl Limits {
    /// The limits of a disk of `capacity` bytes with these parameters.
    pub fn new(capacity: u64, read_only: bool, parameters: &Parameters) -> Self {
        Self {
            capacity,
            read_only,
            discard: SegmentLimits {
                count: parameters.max_discard_seg,
                sectors: parameters.max_discard_sectors,
            },
            write_zeroes: SegmentLimits {
                count: parameters.max_write_zeroes_seg,
                sectors: parameters.max_write_zeroes_sectors,
            },
        }
    }

    /// `len` bytes from `sector` on, if the disk has them.
    fn range(&self, sector: u64, len: u64) -> Result<Range<u64>, Status> {
        let start = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
        let end = start.checked_add(len).ok_or(Status::IoErr)?;
        if end > self.capacity || !len.is_multiple_of(SECTOR) {
            return Err(Status::IoErr);
        }
        Ok(start..end)
    }

    fn writable(&self) -> Result<(), Status> {
        if self.read_only {
            Err(Status::IoErr)
        } else {
            Ok(())
        }
    }
}

/// Takes `chain` for a request. The inner error is what to answer at once; the outer one means that there is no
/// room for an answer.
pub fn parse(
    view: &View,
    chain: &Chain,
    limits: Limits,
) -> Result<Result<Request, Status>, RingError> {
    let Some(data_in) = chain.writable_len().checked_sub(1) else {
        return Err(RingError::Request("block request without a status byte"));
    };
    let Some(data_out) = chain.readable_len().checked_sub(HEADER_LEN) else {
        return Ok(Err(Status::IoErr));
    };
    let mut header = Header::default();
    chain.read(view, 0, header.as_mut_bytes())?;
    let sector = header.sector.get();
    Ok(match header.kind.get() {
        T_IN => limits.range(sector, data_in).map(Request::Read),
        T_OUT => limits
            .writable()
            .and_then(|()| limits.range(sector, data_out))
            .map(Request::Write),
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID if data_in >= ID_LEN as u64 => Ok(Request::GetId),
        T_GET_ID => Err(Status::IoErr),
        T_DISCARD => segments(view, chain, data_out, limits, limits.discard)?
            .and_then(|segments| discard(&segments, limits))
            .map(Request::Discard),
        T_WRITE_ZEROES => segments(view, chain, data_out, limits, limits.write_zeroes)?
            .and_then(|segments| write_zeroes(&segments, limits))
            .map(Request::WriteZeroes),
        _ => Err(Status::Unsupported),
    })
}

fn segments(
    view: &View,
    chain: &Chain,
    len: u64,
    limits: Limits,
    allowed: SegmentLimits,
) -> Result<Result<Vec<Segment>, Status>, RingError> {
    let each = size_of::<Segment>() as u64;
    let count = len / each;
    if limits.read_only
        || count == 0
        || count > u64::from(allowed.count)
        || !len.is_multiple_of(each)
    {
        return Ok(Err(Status::IoErr));
    }
    let mut segments = vec![Segment::default(); count as usize];
    chain.read(view, HEADER_LEN, segments.as_mut_bytes())?;
    Ok(Ok(segments))
}

fn segment_range(
    segment: &Segment,
    limits: Limits,
    allowed: SegmentLimits,
) -> Result<Range<u64>, Status> {
    let sectors = segment.sectors.get();
    if sectors > allowed.sectors {
        return Err(Status::IoErr);
    }
    limits.range(segment.sector.get(), u64::from(sectors) * SECTOR)
}

/// All segments are checked before the first is worked on, so that a request is done as a whole or not at all.
fn discard(segments: &[Segment], limits: Limits) -> Result<Vec<Range<u64>>, Status> {
    if segments.iter().any(|s| s.flags.get() != 0) {
        return Err(Status::Unsupported);
    }
    let range = |s| segment_range(s, limits, limits.discard);
    segments.iter().map(range).collect()
}

fn write_zeroes(segments: &[Segment], limits: Limits) -> Result<Vec<(Range<u64>, bool)>, Status> {
    if segments.iter().any(|s| s.flags.get() & !FLAG_UNMAP != 0) {
        return Err(Status::Unsupported);
    }
    segments
        .iter()
        .map(|s| {
            let range = segment_range(s, limits, limits.write_zeroes)?;
            Ok((range, s.flags.get() & FLAG_UNMAP != 0))
        })
        .collect()
}

/// Offset of the data within the device-readable bytes.
pub const DATA_OUT: u64 = HEADER_LEN;
