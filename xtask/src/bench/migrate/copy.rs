//! The plain copy over a socket that a move is compared with.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Bytes of each `write` and `read`.
const PIECE: usize = 1 << 20;

/// How long it takes to send so many bytes through a Unix socket, from one buffer into another.
pub fn through_socket(bytes: u64) -> Result<Duration> {
    let (mut from, mut to) = UnixStream::pair()?;
    let begun = Instant::now();
    let received = thread::scope(|scope| -> Result<u64> {
        let sender = scope.spawn(move || -> Result<()> {
            // Not zeroes, which the host has one page of.
            let piece = vec![0x5a; PIECE];
            let mut left = bytes;
            while left > 0 {
                let now = left.min(PIECE as u64) as usize;
                from.write_all(&piece[..now])?;
                left -= now as u64;
            }
            Ok(())
        });
        let mut piece = vec![0; PIECE];
        let mut received = 0;
        loop {
            match to.read(&mut piece)? {
                0 => break,
                some => received += some as u64,
            }
        }
        sender.join().ok().context("the sender panicked")??;
        Ok(received)
    })?;
    ensure!(received == bytes, "{received} of {bytes} bytes arrived");
    Ok(begun.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_arrives() {
        for bytes in [0, 1, 3 * PIECE as u64 + 7] {
            through_socket(bytes).unwrap();
        }
    }
}
