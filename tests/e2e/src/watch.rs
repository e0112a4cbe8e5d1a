//! Where every process stands when a test takes too long: what a time limit from outside would take to its grave.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// Longer than any single wait of a test, which says itself what it waited for.
const LONG: Duration = Duration::from_secs(600);

/// Runs `test`, and tells on standard error where every process stands each time it has been running for so long.
pub fn watched<T>(name: &str, test: impl FnOnce() -> T) -> T {
    let (done, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{name} has been running for {LONG:?} more\n{}", standing());
            }
        });
        let result = test();
        drop(done);
        result
    })
}

/// Every thread of a program: its state, what it waits for in the kernel, and by which calls it came there.
fn standing() -> String {
    let mut text = String::new();
    for process in numbered(Path::new("/proc")) {
        let line = read(&process.join("cmdline")).replace('\0', " ");
        // Threads of the kernel have none.
        if line.is_empty() {
            continue;
        }
        let _ = writeln!(text, "{} {}", process.display(), line.trim_end());
        for thread in numbered(&process.join("task")) {
            let status = read(&thread.join("status"));
            let of = |field: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(field));
                line.unwrap_or_default().trim().to_owned()
            };
            let waits = read(&thread.join("wchan"));
            let _ = writeln!(text, "    {} {} {waits}", of("Name:"), of("State:"));
            for call in read(&thread.join("stack")).lines() {
                let _ = writeln!(text, "        {call}");
            }
        }
    }
    text
}

/// The entries of a directory that are called by a number.
fn numbered(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.parse::<u32>().is_ok())
        })
        .collect()
}

/// What a file says; nothing if its process has just ended.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
