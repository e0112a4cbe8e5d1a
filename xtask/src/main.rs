//! Build, test and run everything: `cargo xtask demo | test | kvm | image | fuzz | bench | conformance | schema`.
//!
//! It installs or unpacks what is missing, so that a fresh machine with Rust needs nothing else, and keeps what it
//! downloads in `~/.cache/tern`.

mod apt;
mod bench;
mod bzimage;
mod conformance;
mod cpio;
mod demo;
mod emulator;
mod fuzz;
mod image;
mod kvm;
mod modules;
mod packages;
mod process;
mod schema;
mod test;
mod tools;
mod workspace;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Build, test and run tern"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a command where /dev/kvm is usable: here if it performs, otherwise in an emulated host
    Kvm(kvm::Kvm),
    /// Make the test guests: kernels and initial file trees
    Image(ImageArgs),
    /// Build tern, boot a guest with virtual functions under it, save it, restore it, and move it
    Demo(demo::Demo),
    /// Runs inside the machine
    #[command(hide = true)]
    DemoInside(demo::Inside),
    /// Run the tests: native, fuzzing for a bounded time, and end to end with real guests
    Test(test::Test),
    /// Fuzz everything that reads outside bytes, guided by coverage
    Fuzz(fuzz::Fuzz),
    /// Measure, as ratios to other monitors whose binaries are given
    Bench(bench::Bench),
    /// Write docs/conformance.md: the requirements and the tests that hold them
    Conformance(conformance::Conformance),
    /// Write resources/snapshot.schema.json: the JSON Schema of state.json
    Schema(schema::Schema),
}

/// `cargo xtask image`
#[derive(Debug, Args)]
struct ImageArgs {
    /// Only this kernel
    #[arg(long)]
    kernel: Option<image::Kernel>,
    /// Print the paths, one `name=path` per line
    #[arg(long)]
    print: bool,
    /// Print the paths as JSON
    #[arg(long, conflicts_with = "print")]
    json: bool,
    /// Look for later versions of the packages
    #[arg(long)]
    update: bool,
}

impl ImageArgs {
    fn run(self) -> Result<i32> {
        let kernels = self
            .kernel
            .map_or(image::Kernel::ALL.to_vec(), |kernel| vec![kernel]);
        let guests = image::guests(&kernels, self.update)?;
        let directory = image::directory()?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&guests)?);
        } else if self.print {
            println!("directory={}", directory.display());
            for (name, guest) in &guests {
                println!("vmlinuz-{name}={}", guest.vmlinuz.display());
                println!("vmlinux-{name}={}", guest.vmlinux.display());
                println!("initramfs-{name}={}", guest.initramfs.display());
            }
        } else {
            for (name, guest) in &guests {
                println!(
                    "Linux {name} ({}): {}",
                    guest.kernel,
                    guest.initramfs.display()
                );
            }
        }
        Ok(0)
    }
}

fn main() {
    let done = match Cli::parse().task {
        Task::Kvm(kvm) => kvm.run(),
        Task::Image(image) => image.run(),
        Task::Demo(demo) => demo.run(),
        Task::DemoInside(inside) => inside.run(),
        Task::Test(test) => test.run(),
        Task::Fuzz(fuzz) => fuzz.run(),
        Task::Bench(bench) => bench.run(),
        Task::Conformance(conformance) => conformance.run(),
        Task::Schema(schema) => schema.run(),
    };
    std::process::exit(done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        1
    }));
}
