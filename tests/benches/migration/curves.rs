//! How much of a guest is left to copy, over time: ours and others', as a picture.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use spec::{AtDeadline, MemoryMode, StartMigration, VmId};

use crate::{Case, MIB, PATIENCE, booted, peer, qemu, receive};

/// Pages that the guest writes in a second.
const RATES: [u64; 3] = [10_000, 50_000, 200_000];
/// Bytes that may be sent in a second, by us and by QEMU: so that rounds are long enough to be seen.
pub(crate) const BANDWIDTH: u64 = 400 * MIB;
/// The time that is shown, in seconds: a guest that does not converge has no end.
const SHOWN: f64 = 4.0;

/// Bytes that are left, and when.
pub(crate) type Points = Vec<(Duration, u64)>;

struct Curve {
    name: &'static str,
    color: &'static str,
    points: Points,
}

/// Moves guests with each rate, prints how long that took, and draws the curves.
pub(crate) async fn draw(peer: Option<&Path>, file: &Path) -> Result<()> {
    println!(
        "\nConvergence: a guest of 256 MiB that writes pages of 128 MiB, at most {} MiB/s.\n",
        BANDWIDTH / MIB
    );
    println!("| pages/s | who | until nothing is left (ms) |\n|---|---|---|");
    let mut panels = Vec::new();
    for rate in RATES {
        let case = Case {
            memory: 256 * MIB,
            vcpus: 1,
            rate,
            mode: MemoryMode::Auto,
        };
        let mut curves = vec![Curve {
            name: "Whimbrel",
            color: "#0b6e4f",
            points: ours(case).await?,
        }];
        if qemu::version().is_some() {
            let case = Case {
                mode: MemoryMode::Precopy,
                ..case
            };
            let points = tokio::task::spawn_blocking(move || qemu::curve(case)).await??;
            curves.push(Curve {
                name: "QEMU",
                color: "#d1495b",
                points,
            });
        }
        if let Some(program) = peer {
            curves.push(Curve {
                name: "Cloud Hypervisor",
                color: "#30638e",
                points: peer::curve(program, case).await?,
            });
        }
        for curve in &curves {
            let took = curve.points.last().map_or(0, |(at, _)| at.as_millis());
            println!("| {rate} | {} | {took} |", curve.name);
        }
        panels.push((rate, curves));
    }
    std::fs::write(file, svg(&panels)).with_context(|| format!("write {}", file.display()))
}

/// With the mode that is the default, in which nothing has to be decided by an operator.
async fn ours(case: Case) -> Result<Points> {
    // The terminal is read for as long as the guest runs here.
    let ([from, to], vm, _terminal) = booted(case).await?;
    let waiting = receive(to.client()).await?;
    let what = StartMigration {
        mode: case.mode,
        max_downtime_ms: 20,
        max_bandwidth: Some(BANDWIDTH),
        deadline_s: 20,
        at_deadline: Some(AtDeadline::Postcopy),
        insecure: true,
        ..StartMigration::to(waiting.endpoint)
    };
    let start = Instant::now();
    let begun = from.client().vms_migrate(&vm, &what).await?;
    let id: VmId = begun.id.parse()?;
    let mut points = Points::new();
    loop {
        let info = from.client().migrations_info(&id).await?;
        let left = match info.rounds {
            // The first round has not begun.
            0 => case.memory,
            _ => info.remaining_pages.saturating_mul(4096),
        };
        points.push((start.elapsed(), left));
        if info.phase.is_over() {
            ensure!(info.error.is_none(), "{info:?}");
            return Ok(points);
        }
        ensure!(start.elapsed() < PATIENCE, "{info:?}");
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
}

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 200.0;
const MARGIN: f64 = 50.0;

/// A panel for each rate, side by side.
fn svg(panels: &[(u64, Vec<Curve>)]) -> String {
    let count = f64::from(u32::try_from(panels.len()).unwrap_or(1));
    let (width, height) = (count * (WIDTH + MARGIN) + MARGIN, HEIGHT + 3.0 * MARGIN);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut left = MARGIN;
    for (rate, curves) in panels {
        // Writing to a string does not fail.
        let _ = panel(&mut out, left, *rate, curves);
        left += WIDTH + MARGIN;
    }
    let mut at = MARGIN;
    for curve in panels.first().map_or(&[][..], |(_, curves)| curves) {
        let y = height - 20.0;
        let _ = writeln!(
            out,
            "<line x1=\"{at}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"{}\" stroke-width=\"3\"/>\n\
             <text x=\"{}\" y=\"{}\">{}</text>",
            at + 24.0,
            curve.color,
            at + 30.0,
            y + 4.0,
            curve.name
        );
        at += 160.0;
    }
    out + "</svg>\n"
}

/// Seconds and MiB of a point.
fn coordinates((at, left): (Duration, u64)) -> (f64, f64) {
    let kib = u32::try_from(left >> 10).unwrap_or(u32::MAX);
    (at.as_secs_f64(), f64::from(kib) / 1024.0)
}

fn panel(out: &mut String, left: f64, rate: u64, curves: &[Curve]) -> std::fmt::Result {
    let all = curves.iter().flat_map(|curve| &curve.points);
    let (mut end, mut most) = (0.1_f64, 1.0_f64);
    for point in all {
        let (at, mib) = coordinates(*point);
        (end, most) = (end.max(at.min(SHOWN)), most.max(mib));
    }
    let x = |at: f64| left + at / end * WIDTH;
    let y = |mib: f64| MARGIN + HEIGHT - mib / most * HEIGHT;
    writeln!(
        out,
        "<text x=\"{left}\" y=\"30\" font-weight=\"bold\">{rate} pages/s</text>\n\
         <text x=\"{left}\" y=\"{}\" fill=\"#555\">MiB left</text>",
        MARGIN - 6.0
    )?;
    for part in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (mib, at) = (part * most, part * end);
        writeln!(
            out,
            "<line x1=\"{left}\" y1=\"{0}\" x2=\"{1}\" y2=\"{0}\" stroke=\"#ddd\"/>\n\
             <text x=\"{2}\" y=\"{3}\" text-anchor=\"end\" fill=\"#555\">{mib:.0}</text>\n\
             <text x=\"{4}\" y=\"{5}\" text-anchor=\"middle\" fill=\"#555\">{at:.1} s</text>",
            y(mib),
            left + WIDTH,
            left - 5.0,
            y(mib) + 4.0,
            x(at),
            MARGIN + HEIGHT + 18.0
        )?;
    }
    for curve in curves {
        let points = curve.points.iter().map(|point| coordinates(*point));
        let shown = points.take_while(|(at, _)| *at <= end);
        let line: Vec<_> = shown
            .map(|(at, mib)| format!("{:.1},{:.1}", x(at), y(mib)))
            .collect();
        writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>",
            line.join(" "),
            curve.color
        )?;
    }
    Ok(())
}
