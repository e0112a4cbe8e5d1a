//! What drivers see of devices and no option asks for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::machine::{MachineError, wrong};
use crate::config;

/// Parameters of the devices of a machine, by type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// Of disks.
    pub block: Block,
    /// Of network devices.
    pub net: Net,
    /// Of the entropy device.
    pub rng: Rng,
    /// Of the virtio console.
    pub console: Console,
}

/// Parameters of disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// Entries of each virtqueue.
    pub queue_size: u16,
    /// Data buffers of one request.
    pub seg_max: u32,
    /// log2 of the sectors in a physical block.
    pub physical_block_exp: u8,
    /// In sectors; 0 for none.
    pub min_io_size: u16,
    /// Sectors of one range of a DISCARD.
    pub max_discard_sectors: u32,
    /// Ranges of one DISCARD.
    pub max_discard_seg: u32,
    /// In sectors.
    pub discard_sector_alignment: u32,
    /// Sectors of one range of a WRITE_ZEROES.
    pub max_write_zeroes_sectors: u32,
    /// Ranges of one WRITE_ZEROES.
    pub max_write_zeroes_seg: u32,
    /// A WRITE_ZEROES may give space back.
    pub write_zeroes_may_unmap: bool,
}

/// Parameters of network devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// Entries of each virtqueue.
    pub queue_size: u16,
}

/// Parameters of the entropy device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rng {
    /// Entries of its virtqueue.
    pub queue_size: u16,
}

/// Parameters of the virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Entries of each virtqueue.
    pub queue_size: u16,
    /// Size of the terminal, if the driver is told one.
    pub size: Option<Size>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

impl Parameters {
    /// The JSON of `parameters`.
    pub fn of(parameters: &config::Parameters) -> Self {
        let config::Parameters {
            block,
            net,
            rng,
            console,
        } = parameters;
        let devices::block::Parameters {
            queue_size,
            seg_max,
            physical_block_exp,
            min_io_size,
            max_discard_sectors,
            max_discard_seg,
            discard_sector_alignment,
            max_write_zeroes_sectors,
            max_write_zeroes_seg,
            write_zeroes_may_unmap,
        } = *block;
        Self {
            block: Block {
                queue_size,
                seg_max,
                physical_block_exp,
                min_io_size,
                max_discard_sectors,
                max_discard_seg,
                discard_sector_alignment,
                max_write_zeroes_sectors,
                max_write_zeroes_seg,
                write_zeroes_may_unmap,
            },
            net: Net {
                queue_size: net.queue_size,
            },
            rng: Rng {
                queue_size: rng.queue_size,
            },
            console: Console {
                queue_size: console.queue_size,
                size: console.size.map(|size| Size {
                    columns: size.columns,
                    rows: size.rows,
                }),
            },
        }
    }

    /// The parameters, if devices can be built with them.
    pub(super) fn to_config(&self) -> Result<config::Parameters, MachineError> {
        let block = &self.block;
        let parameters = config::Parameters {
            block: devices::block::Parameters {
                queue_size: block.queue_size,
                seg_max: block.seg_max,
                physical_block_exp: block.physical_block_exp,
                min_io_size: block.min_io_size,
                max_discard_sectors: block.max_discard_sectors,
                max_discard_seg: block.max_discard_seg,
                discard_sector_alignment: block.discard_sector_alignment,
                max_write_zeroes_sectors: block.max_write_zeroes_sectors,
                max_write_zeroes_seg: block.max_write_zeroes_seg,
                write_zeroes_may_unmap: block.write_zeroes_may_unmap,
            },
            net: devices::net::Parameters {
                queue_size: self.net.queue_size,
            },
            rng: devices::rng::Parameters {
                queue_size: self.rng.queue_size,
            },
            console: devices::console::Parameters {
                queue_size: self.console.queue_size,
                size: self.console.size.map(|size| devices::console::Size {
                    columns: size.columns,
                    rows: size.rows,
                }),
            },
        };
        for (name, checked) in [
            ("block", parameters.block.check()),
            ("net", parameters.net.check()),
            ("rng", parameters.rng.check()),
            ("console", parameters.console.check()),
        ] {
            checked.map_err(|error| wrong(format!("parameters.{name}"), error))?;
        }
        Ok(parameters)
    }
}
