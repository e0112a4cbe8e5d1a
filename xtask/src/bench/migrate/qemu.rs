//! QEMU, told over QMP.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::guest::{
    Bench, CPUS, Case, DOWNTIME_MS, Gap, How, Move, Mover, PATIENCE, Sent, beat_after, beat_before,
    remove, us,
};
use crate::process::Monitor;

/// Bytes a second that no socket has.
const UNLIMITED: u64 = 1 << 40;

/// The program, and where its guest is.
pub struct Qemu {
    program: PathBuf,
    case: Option<Case>,
    guest: Option<Process>,
    number: u32,
}

/// A process with or for a guest.
struct Process {
    monitor: Monitor,
    control: Control,
    /// Its guest's memory, a file.
    memory: PathBuf,
}

impl Qemu {
    pub fn new(program: PathBuf) -> Self {
        Self {
            program,
            case: None,
            guest: None,
            number: 0,
        }
    }

    fn start(&mut self, bench: &Bench<'_>, memory: &Path, options: &[&str]) -> Result<Process> {
        let case = self.case.context("there is no guest")?;
        self.number += 1;
        let socket = bench.path(&format!("qemu-{}.sock", self.number));
        let mut command = Command::new(&self.program);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "q35,accel=kvm,memory-backend=ram"]);
        command.args(["-cpu", "host", "-smp", &CPUS.to_string()]);
        command.args(["-m", &case.size.to_string(), "-object"]);
        command.arg(format!(
            "memory-backend-file,id=ram,size={},share=on,mem-path={}",
            case.size,
            memory.display()
        ));
        command.arg("-kernel").arg(bench.kernel);
        command.arg("-initrd").arg(bench.initrd);
        command.args(["-append", &bench.line(case)]);
        command.arg("-drive").arg(format!(
            "if=none,id=disk,format=raw,file={}",
            bench.path("qemu.raw").display()
        ));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        command.args(["-serial", "stdio", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(options);
        let mut monitor = Monitor::interactive(command)?;
        let control = Control::connect(&socket, &mut monitor)
            .with_context(|| monitor.obituary().unwrap_or_default())?;
        Ok(Process {
            monitor,
            control,
            memory: memory.to_owned(),
        })
    }
}

impl Mover for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn boot(&mut self, bench: &Bench<'_>, case: Case) -> Result<()> {
        self.end();
        self.case = Some(case);
        bench.disk("qemu.raw")?;
        let memory = bench.path(&format!("qemu-ram-{}", self.number));
        self.guest = Some(self.start(bench, &memory, &[])?);
        Ok(())
    }

    fn end(&mut self) {
        if let Some(former) = self.guest.take() {
            remove(&former.memory);
        }
    }

    fn go(&mut self, bench: &Bench<'_>, how: How) -> Result<Move> {
        let mut source = self.guest.take().context("there is no guest")?;
        let before_us = beat_before(&mut source.monitor)?;
        let shared = how == How::HandedOver;
        let memory = if shared {
            source.memory.clone()
        } else {
            bench.path(&format!("qemu-ram-{}", self.number))
        };
        let mut destination = self.start(bench, &memory, &["-incoming", "defer"])?;
        let uri = format!(
            "unix:{}",
            bench.path(&format!("qemu-move-{}", self.number)).display()
        );
        let capabilities = json!({ "capabilities": [
            { "capability": "x-ignore-shared", "state": shared },
            { "capability": "events", "state": true },
        ]});
        for control in [&mut source.control, &mut destination.control] {
            control.ask("migrate-set-capabilities", &capabilities)?;
        }
        let limits = json!({ "max-bandwidth": UNLIMITED, "downtime-limit": DOWNTIME_MS });
        source.control.ask("migrate-set-parameters", &limits)?;
        destination
            .control
            .ask("migrate-incoming", &json!({ "uri": uri }))?;
        let cpu = source.monitor.cpu_time()? + destination.monitor.cpu_time()?;
        source.control.ask("migrate", &json!({ "uri": uri }))?;
        let (stopped, _) = source.control.event("STOP")?;
        loop {
            let (_, data) = source.control.event("MIGRATION")?;
            match data["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    let why = source.control.ask("query-migrate", &Value::Null)?;
                    bail!("{why}\n{}", destination.monitor.last_words());
                }
                _ => {}
            }
        }
        let (resumed, _) = destination.control.event("RESUME")?;
        let cpu = source.monitor.cpu_time()? + destination.monitor.cpu_time()? - cpu;
        let told = source.control.ask("query-migrate", &Value::Null)?;
        let around_us = beat_after(&mut destination.monitor)?;
        let number = |value: &Value| value.as_u64().with_context(|| told.to_string());
        let total_ms = number(&told["total-time"])?;
        let bytes = number(&told["ram"]["transferred"])?;
        if !shared {
            remove(&source.memory);
        }
        self.guest = Some(destination);
        Ok(Move {
            total_us: total_ms as f64 * 1e3,
            pause_us: resumed - stopped,
            parts: None,
            gap: Gap {
                before_us,
                around_us,
            },
            cpu_us: us(cpu),
            sent: Some(Sent {
                bytes,
                not_zero: None,
            }),
            plain_us: None,
        })
    }
}

/// A QMP connection.
struct Control {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events that came before the answer of a command.
    events: VecDeque<Value>,
}

impl Control {
    fn connect(socket: &Path, monitor: &mut Monitor) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                // The socket is there before anybody listens.
                Err(_) if monitor.obituary().is_none() && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error).context("QMP"),
            }
        };
        writer.set_read_timeout(Some(PATIENCE))?;
        let mut control = Self {
            reader: BufReader::new(writer.try_clone()?),
            writer,
            events: VecDeque::new(),
        };
        control.read()?;
        control.ask("qmp_capabilities", &Value::Null)?;
        Ok(control)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("QMP")? == 0 {
            bail!("QMP: the connection has ended");
        }
        serde_json::from_str(&line).with_context(|| line)
    }

    /// What it returns.
    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        writeln!(self.writer, "{request}").context("QMP")?;
        loop {
            let answer = self.read()?;
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            self.events.push_back(answer);
        }
    }

    /// Waits for an event: when it was, in microseconds, and its data. Others before it are passed over.
    fn event(&mut self, name: &str) -> Result<(f64, Value)> {
        loop {
            let next = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .read()
                    .with_context(|| format!("waiting for the event {name}"))?,
            };
            if next["event"] == name {
                let part = |key: &str| next["timestamp"][key].as_f64().context("no timestamp");
                let at = part("seconds")? * 1e6 + part("microseconds")?;
                return Ok((at, next["data"].clone()));
            }
        }
    }
}
