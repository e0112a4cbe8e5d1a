//! The control port, and the pumps between it and the command.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use machine::protocol::{CHUNK, Frame, write_frame};

/// The writing side of the control port, and the origin of readers.
pub struct Port {
    writer: Mutex<File>,
    reader: File,
}

impl Port {
    pub fn open(port: OwnedFd) -> io::Result<Self> {
        let writer = File::from(port);
        let reader = writer.try_clone()?;
        Ok(Self {
            writer: Mutex::new(writer),
            reader,
        })
    }

    pub fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *writer, frame)
    }

    /// There is to be one reader at a time: frames have no other boundary than their lengths.
    pub fn reader(&self) -> io::Result<File> {
        self.reader.try_clone()
    }
}

/// Sends what can be read from `source` until its end, as frames made by `frame`.
pub fn pump_output(
    port: &Arc<Port>,
    mut source: File,
    frame: fn(Vec<u8>) -> Frame,
) -> JoinHandle<()> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match source.read(&mut buffer) {
                // A terminal whose other side is closed answers with an error (EIO), not with an end of file.
                Ok(0) => return,
                Ok(n) => {
                    if port.send(&frame(buffer[..n].to_vec())).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// Where standard input goes, without ever blocking the reader of the port.
pub struct Input(Sender<Vec<u8>>);

impl Input {
    /// Starts writing to `sink` what [`Input::put`] is given.
    pub fn new(port: &Arc<Port>, sink: File) -> Self {
        let (sender, queue) = channel();
        let port = Arc::clone(port);
        thread::spawn(move || drain(&queue, sink, &port));
        Self(sender)
    }

    pub fn put(&self, bytes: Vec<u8>) {
        // Fails when the command has closed its input, which is its right.
        let _ = self.0.send(bytes);
    }
}

fn drain(queue: &Receiver<Vec<u8>>, sink: File, port: &Port) {
    let mut sink = Some(sink);
    for bytes in queue {
        if let Some(file) = &mut sink
            && file.write_all(&bytes).is_err()
        {
            sink = None;
        }
        // Credit is given for what was thrown away too: the sender is not to wait for a command that reads no more.
        if port.send(&Frame::Credit(bytes.len() as u32)).is_err() {
            return;
        }
    }
}
