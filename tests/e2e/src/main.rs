//! End-to-end tests: stock Linux guests under `tern`, on real KVM.
//!
//! This is a program and not a `#[test]` so that it runs unchanged where `/dev/kvm` performs: on this host, or, run
//! by `cargo xtask kvm`, in an emulated one. It takes the options of a Rust test binary (a name filter, `--list`,
//! `--test-threads`) and finds what it needs in the environment:
//!
//! | variable | |
//! |---|---|
//! | `TERN` | the monitor under test |
//! | `TERN_IMAGES` | the directory `cargo xtask image` made: kernels and initramfs |
//! | `TERN_ROUNDS` | how often guests are saved and restored, or moved, by tests that do so again and again; a few times if not set |
//! | `TERN_SEED` | the moments at which they do so, as a test that failed told it |

mod api;
mod block;
mod boot;
mod chance;
mod console;
mod control;
mod load;
mod managed;
mod migrate;
mod net;
mod owners;
mod refusals;
mod snapshot;
mod sriov;
mod steady;
mod stops;
mod vm;
mod watch;

use libtest_mimic::{Arguments, Trial};

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let trials: Vec<Trial> = [
        boot::trials(),
        block::trials(),
        net::trials(),
        console::trials(),
        sriov::trials(),
        api::trials(),
        owners::trials(),
        stops::trials(),
        managed::trials(),
        steady::trials(),
        snapshot::trials(),
        migrate::trials(),
        refusals::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test that fails with an error and its causes. They are told at once: what the runner keeps for its summary is lost
/// if the machine does not live to see it.
fn trial(
    name: impl Into<String>,
    test: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let name = name.into();
    let told = name.clone();
    Trial::test(name, move || {
        watch::watched(&told, test).map_err(|error| {
            eprintln!("{told} has failed: {error:#}");
            "see above".into()
        })
    })
}
