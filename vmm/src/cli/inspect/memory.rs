//! Memory of a snapshot: its files, what is in them, and whether they belong to the state.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use migration::directory::MEMORY;
use migration::memory::header::Header;
use migration::{Bases, Expected, Image, PAGE_SIZE, Progress, Reader};
use rustix::fs::SeekFrom;
use serde_json::{Value, json};

/// The memory of a snapshot.
#[derive(Debug)]
pub struct Memory {
    /// Bytes of guest RAM.
    pub bytes: u64,
    /// The files, the snapshot's own first; each is the base of the one before it.
    pub layers: Vec<Layer>,
    /// Why a base could not be opened, which then is not among the files.
    pub missing: Option<String>,
    /// The contents are what was written: they were read.
    pub verified: bool,
}

/// One file of it.
#[derive(Debug)]
pub struct Layer {
    /// Directory of its snapshot.
    pub directory: PathBuf,
    /// Id of its snapshot.
    pub id: String,
    /// Pages it has.
    pub pages: u64,
    /// Those of them that are not all zero.
    pub data_pages: u64,
    /// What it takes on disk.
    pub extents: Extents,
}

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    /// Its length.
    pub bytes: u64,
    /// Those that are not in holes.
    pub data: u64,
}

impl Memory {
    /// Looks at the memory of `snapshot`, which has to be what its state says: at what its files say, and with `verify` at
    /// all of them. Without, bases need not be there.
    pub fn open(snapshot: &Reader, state: &Expected, verify: bool) -> anyhow::Result<Self> {
        let header = snapshot.header()?;
        let path = snapshot.path().join(MEMORY);
        state.check(&path, &header)?;
        let bytes = header.layout.bytes();
        let image = match Image::open(snapshot, None, Bases::Follow) {
            Ok(image) => image,
            Err(error) if header.base.is_some() && !verify => {
                return Ok(Self {
                    bytes,
                    layers: vec![Layer::new(snapshot.path(), &header, &path)?],
                    missing: Some(error.to_string()),
                    verified: false,
                });
            }
            Err(error) => return Err(error.into()),
        };
        if verify {
            image.verify(&mut |_: Progress| ControlFlow::Continue(()))?;
        }
        let layers = image.layers().iter();
        let layers = layers.map(|layer| Layer::new(&layer.directory, &layer.header, layer.path()));
        Ok(Self {
            bytes,
            layers: layers.collect::<anyhow::Result<_>>()?,
            missing: None,
            verified: verify,
        })
    }

    pub fn in_json(&self) -> Value {
        let layers = self.layers.iter().map(|layer| {
            json!({
                "directory": layer.directory,
                "id": layer.id,
                "pages": layer.pages,
                "data_pages": layer.data_pages,
                "file": {
                    "bytes": layer.extents.bytes,
                    "data": layer.extents.data,
                    "holes": layer.extents.holes(),
                },
            })
        });
        json!({
            "bytes": self.bytes,
            "page_size": PAGE_SIZE,
            "files": layers.collect::<Vec<_>>(),
            "missing_base": self.missing,
            "verified": self.verified,
        })
    }
}

impl Layer {
    fn new(directory: &Path, header: &Header, file: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            directory: directory.to_owned(),
            id: header.id.to_string(),
            pages: header.pages,
            data_pages: header.data_pages,
            extents: extents(file).with_context(|| file.display().to_string())?,
        })
    }
}

impl Extents {
    /// Bytes in holes, which read as zero.
    pub fn holes(self) -> u64 {
        self.bytes - self.data
    }
}

/// How much of a file is data.
pub fn extents(path: &Path) -> anyhow::Result<Extents> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let (mut data, mut at) = (0, 0);
    while at < bytes {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start.min(bytes),
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start))?;
        // It always goes on, whatever the file system says.
        let end = end.clamp(start + 1, bytes.max(start + 1));
        data += end.min(bytes) - start;
        at = end;
    }
    Ok(Extents { bytes, data })
}
