//! DEV_WRITE_RECORD_CAP_QUERY, DEV_WRITE_RECORDS_START, DEV_WRITE_RECORDS_STOP and DEV_WRITE_RECORDS_READ.

use super::{BAD_FIELD, BAD_STATE, Exchange, Refusal};
use crate::admin::envelope::{Answer, Failure, Qualifier, Status, zero_extended};
use crate::memory::records::{MAX_RANGES, PAGE_SIZES, PageRange, RecordError};

/// Bytes of the data of DEV_WRITE_RECORDS_START before its ranges.
const START_HEADER: usize = 16;
/// Bytes of one of these ranges: le64 page address, le64 page count.
const RANGE: usize = 16;
/// Bytes of an address that is reported.
const ADDRESS: usize = 8;

impl From<RecordError> for Refusal {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::NotStarted => BAD_STATE.into(),
            RecordError::NoMemory => Self::Failed(Failure {
                status: Status::NoMemory,
                qualifier: Qualifier::NoResource,
            }),
            _ => BAD_FIELD.into(),
        }
    }
}

/// DEV_WRITE_RECORD_CAP_QUERY: the page sizes, bit n for 4 KiB << n, and how many ranges there can be (S3-38).
pub(super) fn capabilities() -> Answer {
    let words = [PAGE_SIZES, MAX_RANGES];
    words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect::<Vec<_>>()
        .into()
}

impl Exchange<'_> {
    /// DEV_WRITE_RECORDS_START (S3-43, G3-v).
    pub(super) fn start_records(&mut self) -> Result<Answer, Refusal> {
        let page_size = u64::from_le_bytes(zero_extended(self.data, 0));
        let count = u32::from_le_bytes(zero_extended(self.data, 8));
        if count > MAX_RANGES {
            return Err(BAD_FIELD.into());
        }
        let ranges = (0..count as usize).map(|index| {
            let at = START_HEADER + index * RANGE;
            PageRange {
                page_address: u64::from_le_bytes(zero_extended(self.data, at)),
                page_count: u64::from_le_bytes(zero_extended(self.data, at + 8)),
            }
        });
        let ranges: Vec<_> = ranges.collect();
        let records = self.member.records();
        records.start(self.party(), page_size, &ranges)?;
        Ok(Answer::default())
    }

    /// DEV_WRITE_RECORDS_STOP (S3-40).
    pub(super) fn stop_records(&mut self) -> Answer {
        self.member.records().stop(self.party());
        Answer::default()
    }

    /// DEV_WRITE_RECORDS_READ: as many pages as there is room for; the rest stays recorded (S3-42, G3-u).
    pub(super) fn read_records(&mut self) -> Result<Answer, Refusal> {
        let start = u64::from_le_bytes(zero_extended(self.data, 0));
        let length = u64::from_le_bytes(zero_extended(self.data, 8));
        let mut pages = Vec::new();
        let records = self.member.records();
        records.read(self.party(), start, length, self.room / ADDRESS, &mut pages)?;
        Ok(Answer {
            // There are fewer pages of RAM than that.
            output: pages.len() as u32,
            result: pages.iter().flat_map(|page| page.to_le_bytes()).collect(),
        })
    }
}
