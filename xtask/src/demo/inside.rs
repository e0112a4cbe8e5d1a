//! What is shown, where `/dev/kvm` performs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::process::Monitor;

/// Before each line of the guest's console, and of what `tern` says.
const GUEST: &str = "  | ";
const SAID: &str = "  ";
/// What the load says every second, and when it is over.
const TICK: &str = "tern-guest: tick ";
const LOAD_OK: &str = "tern-guest: ok steady";
const ALL_OK: &str = "tern-guest: done status=ok";
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tern.run=sriov-enable:n=2,demo:disks=1:networks=2,\
                       steady:mib=16:disks=vda:vfs=2:lost=256";
const MANAGED: &str = "console=ttyS0 quiet panic=-1 tern.run=managed:packed=yes:holds=1";
/// What a guest says that waits for somebody to do something with it.
const ASKED: &str = "tern-guest: type a line";
const DISK: u64 = 64 << 20;
/// Exit statuses of a monitor whose guest was saved to go on elsewhere, or moved.
const STOPPED: i32 = 6;
const MOVED: i32 = 8;
/// How long anything may take. A bound on waiting, not a measurement.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs inside the machine.
#[derive(Debug, Args)]
pub struct Inside {
    #[arg(long)]
    tern: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
}

impl Inside {
    /// Shows everything, in a directory that is gone afterwards.
    pub fn run(self) -> Result<i32> {
        let scratch = PathBuf::from(format!("/tmp/tern-demo-{}", std::process::id()));
        fs::create_dir(&scratch).with_context(|| scratch.display().to_string())?;
        let shown = self.show(&Place {
            tern: &self.tern,
            directory: &scratch,
        });
        fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
        shown?;
        Ok(0)
    }

    fn show(&self, place: &Place<'_>) -> Result<()> {
        let disk = place.directory.join("disk.raw");
        File::create(&disk)
            .and_then(|file| file.set_len(DISK))
            .with_context(|| disk.display().to_string())?;

        title("A guest with a disk, a network, and a card that owns virtual functions");
        let mut run = vec!["run", "--kernel", text(&self.kernel)?];
        run.extend(["--initrd", text(&self.initrd)?, "--cmdline", CMDLINE]);
        run.extend(["--cpus", "2", "--memory", "256M"]);
        run.extend(["--disk", "path=disk.raw,serial=TERN-DEMO"]);
        run.extend(["--net", "switch=lan", "--net", "switch=lan"]);
        run.extend(["--pf", "net,vfs=2", "--api-socket", "1.sock"]);
        let mut first = place.start(&run)?;
        ticks(&mut first)?;

        title("It is saved, and goes on from there in another process");
        place.ask(&["snapshot", "--api-socket", "1.sock", "--stop", "saved"])?;
        end(first, STOPPED)?;
        let mut second = place.start(&["restore", "saved", "--api-socket", "2.sock"])?;
        ticks(&mut second)?;

        title("It is moved to another process, and its memory is copied while it runs");
        let mut third = place.start(&["receive", "unix:copy.sock", "--api-socket", "3.sock"])?;
        place.await_file("copy.sock")?;
        let copy = ["migrate", "--api-socket", "2.sock", "--copy"];
        let said = place.ask(&[&copy[..], &["unix:copy.sock"]].concat())?;
        ensure!(said.contains("copied in"), "its memory was not copied");
        end(second, MOVED)?;
        ticks(&mut third)?;

        title("It is moved once more, and its memory is handed over");
        let mut fourth = place.start(&["receive", "unix:move.sock", "--api-socket", "4.sock"])?;
        place.await_file("move.sock")?;
        let said = place.ask(&["migrate", "--api-socket", "3.sock", "unix:move.sock"])?;
        ensure!(said.contains("handed over"), "its memory was copied");
        end(third, MOVED)?;
        ticks(&mut fourth)?;

        title("It is told that this is enough, looks at everything once more, and powers off");
        fourth.type_line("enough")?;
        fourth.wait_for(LOAD_OK, PATIENCE)?;
        fourth.wait_for(ALL_OK, PATIENCE)?;
        end(fourth, 0)?;
        self.show_managed(place)?;
        println!(
            "\nLinux booted and used virtual functions, was saved and restored, copied, and handed over. It lost nothing.\n\
             A driver made network cards and a disk by commands, destroyed one, and had it again where it was."
        );
        Ok(())
    }

    /// Devices that have no PCI function, moved once.
    fn show_managed(&self, place: &Place<'_>) -> Result<()> {
        for number in 0..=1 {
            let path = place.directory.join(format!("made{number}.raw"));
            File::create(&path)
                .and_then(|file| file.set_len(DISK))
                .with_context(|| path.display().to_string())?;
        }
        title("A guest whose driver makes devices by commands on a transport virtqueue");
        let mut run = vec!["run", "--kernel", text(&self.kernel)?];
        run.extend(["--initrd", text(&self.initrd)?, "--cmdline", MANAGED]);
        run.extend(["--memory", "256M", "--manager", "net,devices=2,packed"]);
        run.extend(["--manager", "block,devices=1,path=made%d.raw,packed"]);
        run.extend(["--api-socket", "5.sock"]);
        let mut first = place.start(&run)?;
        first.wait_for(ASKED, PATIENCE)?;
        place.ask(&["info", "--api-socket", "5.sock"])?;

        title("It is moved with them");
        let mut second = place.start(&["receive", "unix:made.sock", "--api-socket", "6.sock"])?;
        place.await_file("made.sock")?;
        place.ask(&["migrate", "--api-socket", "5.sock", "unix:made.sock"])?;
        end(first, MOVED)?;
        second.type_line("go on")?;
        second.wait_for(ALL_OK, PATIENCE)?;
        end(second, 0)
    }
}

fn title(what: &str) {
    println!("\n== {what}\n");
}

/// Where all this happens. Commands run there, and name their files as they are shown.
struct Place<'a> {
    tern: &'a Path,
    directory: &'a Path,
}

impl Place<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let shown: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        println!("$ tern {}", shown.join(" "));
        let mut command = Command::new(self.tern);
        command.args(words).current_dir(self.directory);
        command
    }

    /// Starts a monitor.
    fn start(&self, words: &[&str]) -> Result<Monitor> {
        let mut monitor = Monitor::interactive(self.command(words))?;
        monitor.shown = Some(GUEST);
        Ok(monitor)
    }

    /// Has a monitor do something; what it says.
    fn ask(&self, words: &[&str]) -> Result<String> {
        let mut command = self.command(words);
        let output = command.stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in said.lines() {
            println!("{SAID}{line}");
        }
        ensure!(
            output.status.success(),
            "tern {} ended with {}: {}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(said)
    }

    /// Waits until somebody listens there.
    fn await_file(&self, name: &str) -> Result<()> {
        let path = self.directory.join(name);
        let deadline = Instant::now() + PATIENCE;
        while !path.exists() {
            ensure!(Instant::now() < deadline, "{} is not there", path.display());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Waits until the load has verified everything for more than a second.
fn ticks(monitor: &mut Monitor) -> Result<()> {
    for _ in 0..3 {
        monitor.wait_for(TICK, PATIENCE)?;
    }
    Ok(())
}

/// Waits for the end of a monitor.
fn end(mut monitor: Monitor, expected: i32) -> Result<()> {
    let status = monitor.wait_for_end(PATIENCE)?;
    ensure!(
        status.code() == Some(expected),
        "instead of {expected}: {}",
        monitor.obituary().unwrap_or_default()
    );
    println!("{SAID}(the process that had the guest ended with {expected}, as it should)");
    Ok(())
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    if word.contains(' ') {
        format!("\"{word}\"")
    } else {
        word.to_owned()
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is no text", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_shown_as_they_are_typed() {
        assert_eq!(quoted("--pf"), "--pf");
        assert_eq!(quoted("console=ttyS0 quiet"), "\"console=ttyS0 quiet\"");
    }

    #[test]
    fn what_fails_is_told() {
        let place = Place {
            tern: Path::new("sh"),
            directory: Path::new("/"),
        };
        place.ask(&["-c", "exit 0"]).unwrap();
        let error = place.ask(&["-c", "echo no >&2; exit 3"]).unwrap_err();
        assert!(error.to_string().ends_with("exit status: 3: no"), "{error}");
        let ended = place.start(&["-c", "exit 6"]).unwrap();
        assert!(end(ended, STOPPED).is_ok());
        let other = place.start(&["-c", "echo why >&2; exit 1"]).unwrap();
        assert!(end(other, MOVED).unwrap_err().to_string().contains("why"));
    }
}
