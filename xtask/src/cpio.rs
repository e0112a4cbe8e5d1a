//! Archives in the `newc` format of cpio, as the kernel unpacks them into its initial file tree.
//!
//! Our own writer because it must put device nodes into the archive without root, and the same input must give the
//! same bytes: every time stamp is zero and inodes are numbered in the order of writing.
//!
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// Archives are padded to whole blocks of this size.
const BLOCK: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Directories must be added before what is in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, REGULAR | permissions, (0, 0), content);
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[]);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, 0, 1, (0, 0), 0);
        let end = self.bytes.len().next_multiple_of(BLOCK);
        self.bytes.resize(end, 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        self.header(
            path.trim_start_matches('/'),
            self.entries,
            mode,
            links,
            device,
            content.len(),
        );
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn header(
        &mut self,
        path: &str,
        inode: u32,
        mode: u32,
        links: u32,
        device: (u32, u32),
        size: usize,
    ) {
        let fields = [
            inode,
            mode,
            0, // owner
            0, // group
            links,
            0, // modification time
            size as u32,
            0, // device the file is on: major, minor
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, not used in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        let end = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(end, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mode, device, path and content.
    type Entry = (u32, (u32, u32), String, Vec<u8>);

    /// The entries, read back by the format's own rules.
    fn read(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |n: usize| {
                let start = at + 6 + 8 * n;
                u32::from_str_radix(std::str::from_utf8(&archive[start..start + 8]).unwrap(), 16)
                    .unwrap()
            };
            let name_end = at + 110 + field(11) as usize;
            let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
            assert_eq!(archive[name_end - 1], 0);
            let start = name_end.next_multiple_of(4);
            let end = start + field(6) as usize;
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((
                field(1),
                (field(9), field(10)),
                name,
                archive[start..end].to_vec(),
            ));
            at = end.next_multiple_of(4);
        }
    }

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.directory("/dev");
        archive.character_device("/dev/console", 5, 1);
        archive.file("/init", 0o755, b"#!abc");
        archive.symlink("/bin", "usr/bin");
        archive.finish()
    }

    #[test]
    fn entries_read_back_as_they_were_added() {
        let expected = vec![
            (0o040_755, (0, 0), "dev".to_owned(), vec![]),
            (0o020_600, (5, 1), "dev/console".to_owned(), vec![]),
            (0o100_755, (0, 0), "init".to_owned(), b"#!abc".to_vec()),
            (0o120_777, (0, 0), "bin".to_owned(), b"usr/bin".to_vec()),
        ];
        assert_eq!(read(&sample()), expected);
    }

    #[test]
    fn archive_is_whole_blocks_and_always_the_same() {
        assert_eq!(sample().len() % BLOCK, 0);
        assert_eq!(sample(), sample());
    }
}
