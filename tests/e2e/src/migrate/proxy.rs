//! A proxy between the two ends of a migration that does something at a given frame.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result};

/// Bytes of a frame's header; see `docs/migration-protocol.md`.
const HEADER: usize = 32;
/// Kinds of frames.
const MESSAGE: u32 = 0x4e52_4554;
const PAGES: u32 = 2;
const PAGE: usize = 4096;

/// A frame that is waited for: a message of this name, or the first pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// A message. The name is that of `docs/migration-protocol.md`.
    Message(&'static str),
    /// Pages of guest memory.
    Pages,
}

/// What happens at that frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is cut instead of the frame.
    CutBefore,
    /// The connection is cut after the frame.
    CutAfter,
    /// Nothing passes any more, in both directions.
    Silence,
    /// A bit of the frame is flipped.
    Flip,
    /// The frame passes twice.
    Twice,
    /// The test does something, then the frame passes.
    Tell,
}

/// A running proxy.
pub struct Proxy {
    /// Where it listens, as `tern migrate` takes it.
    pub address: String,
    plan: Arc<Plan>,
    told: mpsc::Receiver<mpsc::Sender<()>>,
}

/// What both directions of a connection know.
struct Plan {
    point: Point,
    fault: Fault,
    happened: Mutex<bool>,
    tell: mpsc::Sender<mpsc::Sender<()>>,
}

impl Proxy {
    /// Forwards connections to `to`; on the first of them, `fault` happens at `point`. All others pass unchanged.
    pub fn start(to: u16, point: Point, fault: Fault) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = format!("tcp:127.0.0.1:{}", listener.local_addr()?.port());
        let (tell, told) = mpsc::channel();
        let plan = Arc::new(Plan {
            point,
            fault,
            happened: Mutex::new(false),
            tell,
        });
        let shared = Arc::clone(&plan);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let Ok(near) = near else { return };
                let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else {
                    let _ = near.shutdown(Shutdown::Both);
                    continue;
                };
                let Ok((near_too, far_too)) =
                    near.try_clone().and_then(|n| Ok((n, far.try_clone()?)))
                else {
                    return;
                };
                let (there, back) = (Arc::clone(&plan), Arc::clone(&plan));
                std::thread::spawn(move || there.carry(near, far));
                std::thread::spawn(move || back.carry(far_too, near_too));
            }
        });
        Ok(Self {
            address,
            plan: shared,
            told,
        })
    }

    /// Whether the frame came.
    pub fn happened(&self) -> bool {
        *self.plan.lock()
    }

    /// Waits until the moment of [`Fault::Tell`] has come; the frame waits until the
    /// result is dropped.
    pub fn wait(&self, patience: Duration) -> Result<mpsc::Sender<()>> {
        self.told
            .recv_timeout(patience)
            .context("the frame did not come")
    }
}

impl Plan {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.happened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream) {
        while let Some(mut frame) = read_frame(&mut from) {
            let now = {
                let mut happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
                let now = !*happened && self.is_it(&frame);
                *happened |= now;
                now
            };
            let fault = now.then_some(self.fault);
            match fault {
                Some(Fault::CutBefore) => break,
                Some(Fault::Silence) => {
                    // Long after both have noticed.
                    std::thread::sleep(Duration::from_secs(60));
                    break;
                }
                Some(Fault::Flip) => {
                    if let Some(byte) = frame.last_mut() {
                        *byte ^= 4;
                    }
                }
                Some(Fault::Tell) => self.tell_and_wait(),
                _ => {}
            }
            if to.write_all(&frame).is_err() {
                break;
            }
            match fault {
                Some(Fault::CutAfter) => break,
                Some(Fault::Twice) if to.write_all(&frame).is_err() => break,
                _ => {}
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    fn tell_and_wait(&self) {
        let (go, wait) = mpsc::channel::<()>();
        if self.tell.send(go).is_ok() {
            // Ends when the other side is dropped.
            let _ = wait.recv();
        }
    }

    fn is_it(&self, frame: &[u8]) -> bool {
        let kind = word(frame, 0);
        match self.point {
            Point::Pages => kind == PAGES,
            Point::Message(name) => {
                let body = frame.get(HEADER..).unwrap_or_default();
                let body = body.strip_prefix(b"{").unwrap_or(body);
                let quoted = format!("\"{name}\"");
                kind == MESSAGE && body.starts_with(quoted.as_bytes())
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_le_bytes)
}

/// A frame with the pages that follow it.
fn read_frame(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut frame = vec![0; HEADER];
    from.read_exact(&mut frame).ok()?;
    let body = word(&frame, 4) as usize;
    frame.resize(HEADER + body, 0);
    from.read_exact(frame.get_mut(HEADER..)?).ok()?;
    if word(&frame, 0) == PAGES {
        let runs = word(&frame, HEADER) as usize;
        let count = |run: usize| word(&frame, HEADER + 4 + 12 * run + 8) as usize;
        let pages: usize = (0..runs).map(count).sum();
        let start = frame.len();
        frame.resize(start + pages * PAGE, 0);
        from.read_exact(frame.get_mut(start..)?).ok()?;
    }
    Some(frame)
}
