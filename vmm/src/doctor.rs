//! Whether this host can run guests, and if not, why and what to do.

use std::fmt;
use std::time::Duration;

use kvm_ioctls::Kvm;
use serde::Serialize;

use crate::kvm::{self, KvmError, model::HostCpu, speed};
use crate::layout;

/// Loop iterations of the measurement: enough for a stable figure where the processor executes them.
const ITERATIONS: u32 = 20_000_000;
/// How long the measurement may take.
const DEADLINE: Duration = Duration::from_millis(300);

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Guests run, but something is worse than it could be.
    Warning,
    /// No guest will run.
    Failure,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found, and the cure if there is one.
    pub detail: String,
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Guests can run here.
    pub usable: bool,
    /// Guest instructions a second, if it came to that.
    pub instructions_per_second: Option<f64>,
    /// What was looked at, in order; ends at the first failure.
    pub checks: Vec<Check>,
}

impl Report {
    fn add(&mut self, name: &'static str, verdict: Verdict, detail: impl Into<String>) {
        self.checks.push(Check {
            name,
            verdict,
            detail: detail.into(),
        });
    }

    fn failed(mut self, name: &'static str, error: &KvmError) -> Self {
        self.add(name, Verdict::Failure, error.to_string());
        self
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warning => "warn",
                Verdict::Failure => "FAIL",
            };
            writeln!(f, "{mark}  {:<12} {}", check.name, check.detail)?;
        }
        f.write_str(if self.usable {
            "This host can run guests."
        } else {
            "This host cannot run guests."
        })
    }
}

/// Looks at this host. Takes less than a second wherever it is.
pub fn examine() -> Report {
    let mut report = Report::default();
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return report.failed("/dev/kvm", &error),
    };
    report.add(
        "/dev/kvm",
        Verdict::Ok,
        format!(
            "opens, speaks version {}, has everything needed",
            kvm::API_VERSION
        ),
    );
    processor(&mut report, &kvm);
    memory(&mut report);
    match measure(&kvm) {
        Ok(speed) => {
            let rate = speed.per_second();
            report.instructions_per_second = Some(rate);
            if !speed.is_usable() {
                return report.failed("speed", &KvmError::Interprets((rate / 1e4).round() / 100.0));
            }
            report.add(
                "speed",
                Verdict::Ok,
                format!("{:.0} million guest instructions a second", rate / 1e6),
            );
        }
        Err(error) => return report.failed("speed", &error),
    }
    report.usable = true;
    report
}

fn processor(report: &mut Report, kvm: &Kvm) {
    let Ok(host) = HostCpu::examine(kvm) else {
        report.add("processor", Verdict::Warning, "does not tell its features");
        return;
    };
    let bits = host.physical_address_bits();
    let largest = (1u64 << bits.min(52))
        .saturating_sub(2 * layout::PCI_MMIO64_LEN)
        .min(layout::MAX_RAM);
    report.add(
        "processor",
        Verdict::Ok,
        format!(
            "{bits} address bits: guests of up to {}; up to {} vCPUs",
            layout::format_memory_size(largest),
            kvm.get_max_vcpus()
                .min(usize::from(crate::config::MAX_CPUS))
        ),
    );
}

fn memory(report: &mut Report) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.parse::<u64>().ok())
        .map(|kib| kib / 1024);
    let needed = layout::MIN_RAM / layout::MIB;
    match available {
        None => report.add("memory", Verdict::Warning, "/proc/meminfo does not tell"),
        Some(mib) if mib < 2 * needed => report.add(
            "memory",
            Verdict::Warning,
            format!("only {mib}M available; end something else first"),
        ),
        Some(mib) => report.add("memory", Verdict::Ok, format!("{mib}M available")),
    }
}

fn measure(kvm: &Kvm) -> Result<speed::Speed, KvmError> {
    let mut trial = speed::Trial::new(kvm)?;
    // Once to bring everything in, once to count.
    trial.measure(1000, DEADLINE)?;
    trial.measure(ITERATIONS, DEADLINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_always_comes_to_an_end_with_a_verdict() {
        let report = examine();
        assert!(!report.checks.is_empty());
        let failed = report.checks.iter().any(|c| c.verdict == Verdict::Failure);
        assert_eq!(report.usable, !failed, "{report}");
    }

    #[test]
    fn the_text_marks_failures() {
        let report = Report::default().failed("/dev/kvm", &KvmError::Absent);
        let text = report.to_string();
        assert!(text.starts_with("FAIL  /dev/kvm"), "{text}");
        assert!(text.ends_with("cannot run guests."), "{text}");
    }
}
