//! The plain `write` that a snapshot is compared with.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Bytes of each `write`.
const PIECE: u64 = 1 << 20;
/// Bytes of the buffer that is written from: more than the caches of a processor, and a small part of a guest.
const BUFFER: u64 = 64 << 20;

/// What was written in which time.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    pub bytes: u64,
    pub took: Duration,
}

/// Writes the data of the sparse file `from` to the new file `to`, at the same offsets. Only the time of writing from memory
/// and of syncing counts, not that of reading.
pub fn data(from: &Path, to: &Path) -> Result<Written> {
    let source = File::open(from).with_context(|| from.display().to_string())?;
    let mut buffer = vec![0; BUFFER as usize];
    let mut written = Written {
        bytes: 0,
        took: Duration::ZERO,
    };
    let mut begun = Instant::now();
    let target = File::create_new(to).with_context(|| to.display().to_string())?;
    written.took += begun.elapsed();
    for batch in batches(extents(&source)?) {
        let mut from = 0;
        let mut pieces = Vec::with_capacity(batch.len());
        for piece in &batch {
            let to = from + (piece.end - piece.start) as usize;
            let bytes = buffer
                .get_mut(from..to)
                .context("a batch longer than its buffer")?;
            source.read_exact_at(bytes, piece.start)?;
            pieces.push((from..to, piece.start));
            from = to;
        }
        begun = Instant::now();
        for (bytes, offset) in pieces {
            target.write_all_at(&buffer[bytes], offset)?;
        }
        written.took += begun.elapsed();
        written.bytes += from as u64;
    }
    begun = Instant::now();
    target.sync_all()?;
    written.took += begun.elapsed();
    Ok(written)
}

/// Where a sparse file has data.
fn extents(file: &File) -> Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // None after this.
            Err(Errno::NXIO) => return Ok(extents),
            Err(error) => return Err(error).context("looking for data"),
        };
        at = seek(file, SeekFrom::Hole(start)).context("looking for holes")?;
        extents.push(start..at);
    }
}

/// Pieces of these extents, as many in each batch as the buffer holds.
fn batches(extents: Vec<Range<u64>>) -> Vec<Vec<Range<u64>>> {
    let mut batches = Vec::new();
    let mut batch = Vec::new();
    let mut left = BUFFER;
    for extent in extents {
        let mut at = extent.start;
        while at < extent.end {
            let end = extent.end.min(at + PIECE.min(left));
            batch.push(at..end);
            left -= end - at;
            at = end;
            if left == 0 {
                batches.push(std::mem::take(&mut batch));
                left = BUFFER;
            }
        }
    }
    batches.push(batch);
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_everything_and_fit() {
        let length = |range: &Range<u64>| range.end - range.start;
        let extents = vec![
            0..4096,
            8192..8192 + BUFFER + 3 * PIECE,
            (1 << 40)..(1 << 40) + 1,
        ];
        let batches = batches(extents.clone());
        assert_eq!(batches.len(), 2);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for piece in batches.iter().flatten() {
            assert!((1..=PIECE).contains(&length(piece)));
            match joined.last_mut() {
                Some(last) if last.end == piece.start => last.end = piece.end,
                _ => joined.push(piece.clone()),
            }
        }
        assert_eq!(joined, extents);
        for batch in &batches {
            assert!(batch.iter().map(length).sum::<u64>() <= BUFFER);
        }
    }

    #[test]
    fn a_copy_has_the_same_data() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let file = File::create(at("a")).unwrap();
        for (offset, byte) in [(4096, 1), (5 << 20, 2), ((9 << 20) - 4096, 3)] {
            file.write_all_at(&[byte; 4096], offset).unwrap();
        }
        let written = data(&at("a"), &at("b")).unwrap();
        assert!(written.bytes >= 3 * 4096);
        assert!(std::fs::read(at("a")).unwrap() == std::fs::read(at("b")).unwrap());
        assert!(data(&at("a"), &at("b")).is_err(), "it exists");
    }

    #[test]
    fn a_file_that_is_one_hole_has_no_data() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(extents(&file).unwrap(), []);
        file.write_all_at(&[1; 5000], 0).unwrap();
        let extents = extents(&file).unwrap();
        assert_eq!(extents.first().map(|extent| extent.start), Some(0));
        assert_eq!(extents.last().map(|extent| extent.end), Some(5000));
    }
}
