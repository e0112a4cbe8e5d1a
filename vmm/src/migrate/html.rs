//! The report of a migration as one HTML file that needs nothing else: the figures, and pictures of the rounds of copying
//! and of the pause.

use std::fmt::{self, Display, Write};

use migration::PAGE_SIZE;
use migration::live::report::{Attempt, Report, Round};
use migration::live::source::Phase;
use migration::wire::message::Memory;

/// What every report begins with.
pub const REPORT_BEGINS: &str = "<!doctype html>";

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1c2733;background:#fff}
h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}
table{border-collapse:collapse}td,th{padding:.2em 1em .2em 0;text-align:right;border-bottom:1px solid #dde3ea}
th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}
.key span{display:inline-block;width:.9em;height:.9em;margin:0 .4em 0 1.2em;vertical-align:-.1em}";

/// Width of the pictures.
const WIDTH: f64 = 720.0;
/// Colours of the parts of a pause, and of what was copied and written.
const COLOURS: [&str; 7] = [
    "#1f5fa8", "#4c9f70", "#c8553d", "#8e6bb0", "#3b8ea5", "#d9a441", "#5b6b7b",
];

/// What became of the guest.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// It runs at the destination.
    Moved(&'a Report),
    /// It stays at its source, and why.
    Kept(&'a str, &'a Attempt),
    /// Whether it runs at the destination is not known, and why.
    InDoubt(&'a str, &'a Attempt),
}

/// The file, for a guest that was to be moved to `to`.
pub fn page(to: &str, outcome: Outcome<'_>) -> String {
    let mut html = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut html, to, outcome);
    html
}

fn write(out: &mut String, to: &str, outcome: Outcome<'_>) -> fmt::Result {
    let (text, attempt, report) = match outcome {
        Outcome::Moved(report) => (
            "the guest was moved, and runs there".to_owned(),
            None,
            report,
        ),
        // The reason says that it stays.
        Outcome::Kept(reason, attempt) => (reason.to_owned(), Some(attempt), &attempt.report),
        Outcome::InDoubt(reason, attempt) => {
            let text = format!("in doubt: {reason}");
            (text, Some(attempt), &attempt.report)
        }
    };
    let how = match report.how {
        Memory::Copy => "copied",
        Memory::Handoff => "handed over",
    };
    write!(
        out,
        "{REPORT_BEGINS}\n<html lang=\"en\"><meta charset=\"utf-8\"><title>Migration to {to}</title>\n<style>{STYLE}</style>\n\
         <h1>Migration to {to}</h1>\n<table>\n",
        to = Text(to)
    )?;
    let rows = [("Outcome", text)].into_iter();
    let came = attempt.map(|attempt| ("It came as far as", came(attempt)));
    for (name, value) in rows.chain(came).chain([
        ("Memory", how.to_owned()),
        ("Total", milliseconds(report.total_us)),
        ("Pause", milliseconds(report.pause_us.total)),
        (
            "The destination built the machine in",
            milliseconds(report.build_us),
        ),
        ("Sent", mebibytes(report.bytes)),
        (
            "Sent while the guest stood still",
            mebibytes(report.paused_bytes),
        ),
        ("Session", report.session.clone()),
    ]) {
        writeln!(out, "<tr><td>{name}<td>{}</tr>", Text(&value))?;
    }
    out.push_str("</table>\n");
    if report.pause_us.total > 0 {
        pause(out, report)?;
    }
    if !report.rounds.is_empty() {
        rounds(out, &report.rounds)?;
    }
    out.push_str("</html>\n");
    Ok(())
}

/// How far a migration came, in words.
fn came(attempt: &Attempt) -> String {
    let what = match attempt.phase {
        Phase::Connect => "connecting",
        Phase::Offer => "the offer: the destination was to build the machine",
        Phase::Memory => "copying memory while the guest ran",
        Phase::Pause => "the pause: last pages and state were being sent",
        Phase::Verify => "comparing all of memory",
        Phase::Restore => "restoring: the destination had everything",
        Phase::Commit => "giving the guest away",
    };
    match attempt.report.rounds.len() {
        0 => what.to_owned(),
        1 => format!("{what}, after 1 round of copying"),
        count => format!("{what}, after {count} rounds of copying"),
    }
}

/// The parts of the pause, one after the other.
fn pause(out: &mut String, report: &Report) -> fmt::Result {
    let pause = report.pause_us;
    let parts = pause.parts();
    let scale = WIDTH / pause.total.max(1) as f64;
    write!(
        out,
        "<h2>The pause: {}</h2>\n<svg viewBox=\"0 0 {WIDTH} 40\" role=\"img\" aria-label=\"Parts of the pause\">",
        milliseconds(pause.total)
    )?;
    let mut at = 0.0;
    for (part, colour) in parts.iter().zip(COLOURS) {
        let width = part.us as f64 * scale;
        write!(
            out,
            "<rect x=\"{at:.1}\" y=\"4\" width=\"{width:.1}\" height=\"32\" fill=\"{colour}\"/>"
        )?;
        at += width;
    }
    out.push_str("</svg>\n<table>\n");
    for (part, colour) in parts.iter().zip(COLOURS) {
        writeln!(
            out,
            "<tr><td class=\"key\"><span style=\"background:{colour}\"></span>{}<td>{:.1} ms</tr>",
            part.what,
            part.tenths as f64 / 10.0
        )?;
    }
    out.push_str("</table>\n");
    Ok(())
}

/// What was sent in each round, beside what the guest wrote meanwhile.
fn rounds(out: &mut String, rounds: &[Round]) -> fmt::Result {
    const HEIGHT: f64 = 160.0;
    let most = rounds
        .iter()
        .map(|round| round.data.max(round.written))
        .max();
    let scale = HEIGHT / most.unwrap_or_default().max(1) as f64;
    let step = (WIDTH / rounds.len() as f64).min(90.0);
    write!(
        out,
        "<h2>Rounds of copying</h2>\n<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"Rounds of copying\">",
        HEIGHT + 24.0
    )?;
    for (index, round) in rounds.iter().enumerate() {
        let left = index as f64 * step;
        let bar = step * 0.4;
        for (shift, pages, colour) in [
            (0.0, round.data, COLOURS[0]),
            (bar, round.written, COLOURS[2]),
        ] {
            let height = pages as f64 * scale;
            write!(
                out,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{bar:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>",
                left + shift,
                HEIGHT - height
            )?;
        }
        write!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#1c2733\">{}</text>",
            left + bar,
            HEIGHT + 16.0,
            round.number
        )?;
    }
    writeln!(
        out,
        "</svg>\n<p class=\"key\"><span style=\"background:{}\"></span>sent<span style=\"background:{}\"></span>written by \
         the guest meanwhile</p>\n<table><tr><th>Round<th>Sent<th>Zero<th>Written<th>Time<th>Rate of writing<th>Slowed \
         down<th>Predicted pause</tr>",
        COLOURS[0], COLOURS[2]
    )?;
    for round in rounds {
        let seconds = (round.time_us as f64 / 1e6).max(1e-6);
        let rate = (round.written * PAGE_SIZE) as f64 / f64::from(1 << 20) / seconds;
        writeln!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{rate:.1} MiB/s<td>{} %<td>{}</tr>",
            round.number,
            mebibytes(round.data * PAGE_SIZE),
            mebibytes(round.zero * PAGE_SIZE),
            mebibytes(round.written * PAGE_SIZE),
            milliseconds(round.time_us),
            round.slow_down,
            milliseconds(round.predicted_us),
        )?;
    }
    out.push_str("</table>\n");
    Ok(())
}

fn milliseconds(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Text in HTML.
struct Text<'a>(&'a str);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migration::live::report::Pause;

    use super::*;

    fn report(rounds: usize) -> Report {
        let round = |number: u32| Round {
            number,
            pages: 65536 >> number,
            data: 32768 >> number,
            zero: 100,
            time_us: 900_000 >> number,
            written: 20_000 >> number,
            slow_down: 20,
            predicted_us: 80_000,
        };
        Report {
            session: "00".repeat(16),
            how: Memory::Copy,
            total_us: 1_900_000,
            build_us: 60_000,
            bytes: 200 << 20,
            rounds: (1u32..).take(rounds).map(round).collect(),
            pause_us: Pause {
                total: 60_000,
                stop: 2_000,
                state: 6_000,
                send: 30_000,
                verify: 0,
                restore: 12_000,
                resume: 3_000,
                wait: 7_000,
            },
            paused_bytes: 5 << 20,
        }
    }

    #[test]
    fn the_page_has_the_figures_and_needs_nothing_else() {
        let report = report(4);
        let html = page("unix:/run/a<b>&\"c", Outcome::Moved(&report));
        assert!(html.contains("unix:/run/a&lt;b&gt;&amp;&quot;c") && !html.contains("a<b>"));
        assert!(html.contains("60.0 ms") && html.matches("<rect").count() == 7 + 2 * 4);
        for foreign in ["http:", "https:", "src=", "href="] {
            assert!(!html.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn memory_that_was_handed_over_has_no_rounds() {
        let html = page("unix:a", Outcome::Moved(&report(0)));
        assert!(!html.contains("Rounds of copying"));
    }

    #[test]
    fn a_guest_that_was_not_moved_has_its_reason_and_how_far_it_came() {
        let mut attempt = Attempt {
            phase: Phase::Memory,
            report: report(3),
        };
        attempt.report.pause_us = Pause::default();
        let html = page(
            "unix:a",
            Outcome::Kept("the guest stays here: <why>", &attempt),
        );
        for part in [
            "stays here: &lt;why&gt;",
            "after 3 rounds",
            "Rounds of copying",
        ] {
            assert!(html.contains(part), "{html}");
        }
        assert!(!html.contains("The pause"), "{html}");
        attempt.phase = Phase::Commit;
        attempt.report.pause_us.end(5_000);
        let html = page("unix:a", Outcome::InDoubt("nobody answers", &attempt));
        for part in [
            "in doubt: nobody answers",
            "giving the guest away",
            "The pause: 5.0 ms",
        ] {
            assert!(html.contains(part), "{html}");
        }
    }
}
