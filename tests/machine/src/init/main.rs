//! PID 1 of the emulated host: makes it look like the real one, runs one command there, reports how it ended.
//!
//! It is a static binary and alone in its archive with the modules: everything else is the real host's own file tree,
//! which arrives over 9p, read-only, with a writable overlay in memory above it. The host switches the machine off
//! when it has read the last frame.

mod command;
mod mounts;
mod pin;
mod streams;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use machine::protocol::{ALIVE_EVERY, Frame, PORT_NAME, read_frame};

use streams::Port;

/// How long devices may take to appear.
const PATIENCE: Duration = Duration::from_secs(20);

type Result<T> = std::result::Result<T, String>;

/// Puts what was being done in front of an error.
trait Context<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| format!("{}: {error}", doing()))
    }
}

fn main() {
    let Err(why) = run() else { return };
    // No port to report it on: the console is shown when a machine is lost.
    eprintln!("machine-init: {why}");
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
}

fn run() -> Result<()> {
    mounts::first()?;
    let port = Arc::new(open_port()?);
    if let Err(why) = serve(&port) {
        port.send(&Frame::Failed(why))
            .context(|| "reporting a failure".into())?;
    }
    // The host ends the machine; an init that returns would be a kernel panic.
    loop {
        thread::park();
    }
}

fn serve(port: &Arc<Port>) -> Result<()> {
    // KVM takes longest to load, and nothing before the command needs it.
    let (first, later): (Vec<_>, Vec<_>) = modules()?.into_iter().partition(|module| module.early);
    let kvm = thread::spawn(move || later.iter().try_for_each(Module::load));
    first.iter().try_for_each(Module::load)?;
    mounts::host_tree()?;
    mounts::all()?;
    mounts::loopback_up()?;
    kvm.join()
        .map_err(|_| "loading KVM panicked".to_owned())??;
    mounts::open_devices()?;
    pin::branches()?;
    port.send(&Frame::Ready)
        .context(|| "reporting for work".into())?;
    let alive = Arc::clone(port);
    thread::spawn(move || {
        while alive.send(&Frame::Alive).is_ok() {
            thread::sleep(ALIVE_EVERY);
        }
    });
    let mut reader = port.reader().context(|| "reading the port".into())?;
    let start = match read_frame(&mut reader).context(|| "waiting for a command".into())? {
        Frame::Start(start) => start,
        other => return Err(format!("expected a command, got {other:?}")),
    };
    for share in &start.shares {
        mounts::share(share)?;
    }
    let status = command::run(*start, port, reader)?;
    // What was written to shares is on the real host before it hears that the command has ended.
    rustix::fs::sync();
    port.send(&Frame::Exit(status))
        .context(|| "reporting the status".into())
}

/// A module of the archive. `/modules/list` names them in the order in which they can be loaded, one per line, with a
/// `+` in front of those the file tree needs.
struct Module {
    early: bool,
    name: String,
    /// Opened beforehand: the archive is out of reach once the root has changed.
    file: File,
}

fn modules() -> Result<Vec<Module>> {
    let list = fs::read_to_string("/modules/list").context(|| "/modules/list".into())?;
    let open = |line: &str| {
        let name = line.trim_start_matches('+');
        let file =
            File::open(Path::new("/modules").join(name)).context(|| format!("opening {name}"))?;
        Ok(Module {
            early: line.starts_with('+'),
            name: name.to_owned(),
            file,
        })
    };
    list.lines().map(open).collect()
}

impl Module {
    fn load(&self) -> Result<()> {
        match rustix::system::finit_module(&self.file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(error) => Err(format!("loading {}: {error}", self.name)),
        }
    }
}

/// Finds the port by its name and opens it.
fn open_port() -> Result<Port> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(port) = find_port() {
            return Port::open(port).context(|| "opening the control port".into());
        }
        if Instant::now() > deadline {
            return Err(format!("no virtio-serial port is called {PORT_NAME}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn find_port() -> Option<OwnedFd> {
    let entries = fs::read_dir("/sys/class/virtio-ports").ok()?;
    for entry in entries.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            let device = PathBuf::from("/dev").join(entry.file_name());
            let opened = File::options().read(true).write(true).open(device);
            return opened.ok().map(OwnedFd::from);
        }
    }
    None
}
