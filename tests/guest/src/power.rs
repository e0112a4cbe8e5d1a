//! The ends of a guest, and the button that asks for one.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::system::{RebootCommand, reboot};

use crate::say;

/// `linux/input-event-codes.h`
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` on a 64-bit machine: time (16 bytes), type, code (2 bytes each), value (4 bytes).
const EVENT_SIZE: usize = 24;

/// Flushes the console and the disks, and ends the guest.
pub fn end(how: RebootCommand) -> ! {
    // The kernel says goodbye past the terminal's buffer, in the middle of a line that is still in it. What is no
    // terminal has nothing to wait for.
    let _ = rustix::termios::tcdrain(std::io::stdout());
    rustix::fs::sync();
    if let Err(error) = reboot(how) {
        say(format_args!("FAIL power {error}"));
    }
    // The kernel panics if init returns, and there is nothing left to do but wait.
    loop {
        thread::park();
    }
}

/// Powers the guest off when somebody presses its power button.
pub fn watch_button() {
    for device in power_buttons() {
        thread::spawn(move || {
            if let Ok(file) = File::open(&device) {
                wait_for_press(file);
            }
        });
    }
}

fn power_buttons() -> Vec<PathBuf> {
    let is_button = |name: &str| {
        let called =
            fs::read_to_string(Path::new("/sys/class/input").join(name).join("device/name"));
        called.is_ok_and(|called| called.trim() == "Power Button")
    };
    let entries = fs::read_dir("/sys/class/input")
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("event") && is_button(name))
        .map(|name| Path::new("/dev/input").join(name))
        .collect()
}

fn wait_for_press(mut device: impl Read) {
    let mut event = [0; EVENT_SIZE];
    while device.read_exact(&mut event).is_ok() {
        if is_press(&event) {
            say("power-button pressed");
            end(RebootCommand::PowerOff);
        }
    }
}

fn is_press(event: &[u8; EVENT_SIZE]) -> bool {
    let kind = u16::from_ne_bytes([event[16], event[17]]);
    let code = u16::from_ne_bytes([event[18], event[19]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    (kind, code, value) == (EV_KEY, KEY_POWER, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> [u8; EVENT_SIZE] {
        let mut event = [0xaa; EVENT_SIZE];
        event[16..18].copy_from_slice(&kind.to_ne_bytes());
        event[18..20].copy_from_slice(&code.to_ne_bytes());
        event[20..].copy_from_slice(&value.to_ne_bytes());
        event
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        for other in [
            event(EV_KEY, KEY_POWER, 0),
            event(EV_KEY, 115, 1),
            event(0, 0, 0),
            event(0, KEY_POWER, 1),
        ] {
            assert!(!is_press(&other));
        }
    }
}
