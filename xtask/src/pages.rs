//! Every page the program writes, opened in headless Chromium at the widths of a desk and of a phone,
//! in light and dark. Needs the browser, so it is no part of CI.

use crate::{DEMO_BASE, cargo};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const OUT: &str = "target/pages";
const WIDTHS: [u32; 2] = [1280, 390];
/// Blink's numbers for what the reader prefers.
const THEMES: [(&str, u32); 2] = [("light", 1), ("dark", 0)];
/// A hover must be answered within a frame at 60 Hz, in milliseconds.
const FRAME: f64 = 16.0;

/// Makes the pages and looks at each; any word on a page's console, and any page wider than its
/// screen, is an error. The pictures stay beside the pages.
pub(crate) fn pages() -> Result<()> {
    let chromium = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok())
        .context("no Chromium; install the package `chromium`")?;
    let out = Path::new(OUT);
    if out.exists() {
        fs::remove_dir_all(out)?;
    }
    fs::create_dir_all(out)?;
    let pages = write_pages(out)?;
    let mut faults = Vec::new();
    for page in &pages {
        for width in WIDTHS {
            for theme in THEMES {
                faults.extend(look(chromium, out, page, width, theme)?);
            }
        }
    }
    for fault in &faults {
        println!("{fault}");
    }
    ensure!(faults.is_empty(), "{} of the pages' views have faults", faults.len());
    println!("{} pages in {} views; pictures in {OUT}", pages.len(), WIDTHS.len() * THEMES.len());
    Ok(())
}

fn write_pages(out: &Path) -> Result<Vec<PathBuf>> {
    let line = |i: usize| {
        format!("{{\"instruction\": \"Order {i} of the press\", \"output\": \"order {i}\"}}\n")
    };
    fs::write(out.join("data.jsonl"), (0..400).map(line).collect::<String>())?;
    let other = |i: usize| {
        format!("{{\"instruction\": \"Why does belt {i} stop?\", \"output\": \"it is worn\"}}\n")
    };
    fs::write(out.join("other.jsonl"), (0..60).map(other).collect::<String>())?;
    fs::write(out.join("text.txt"), "Order 7 of the press. ".repeat(18))?;
    let smore = "{kind: smore, targets: [gate_proj, up_proj, down_proj], layers: [{experts: 4, \
                 fanout: 2, rank: 2}, {experts: 4, fanout: 2, rank: 2}], gate: {balance_weight: \
                 0.01, router_width: 8, router_input_width: 8}}";
    // The last one raises alarms.
    let runs = [
        ("lora", "{kind: lora, rank: 8}", ""),
        ("smore", smore, ""),
        ("alarmed", smore, "health: {max_imbalance: 0.2, raise_balance_weight: true}\n"),
    ];
    for (name, adapter, health) in runs {
        let config = format!(
            "model: {DEMO_BASE}\nadapter: {adapter}\ndata: {{train: [{{path: {OUT}/data.jsonl}}], \
             cutoff_len: 64}}\ntrain: {{learning_rate: 3.0e-3, max_steps: 120, eval_steps: 20, \
             per_device_train_batch_size: 8, gradient_accumulation_steps: 1}}\n{health}output_dir: \
             {OUT}/{name}\n"
        );
        let file = out.join(format!("{name}.yaml"));
        fs::write(&file, config)?;
        program(&["train", &text_of(&file)?])?;
    }
    let at = |name: &str| format!("{OUT}/{name}");
    let adapter = ["--model", DEMO_BASE, "--adapter"];
    let with = |before: &[&str], after: &[&str]| {
        let all = before.iter().chain(&adapter).chain(after);
        all.map(|&s| s.to_owned()).collect::<Vec<_>>()
    };
    let (own, text, other) = (at("smore/adapter"), at("text.txt"), at("other.jsonl"));
    let trace = with(&["trace"], &[&own, "--file", &text, "--answer", "order", "--html"]);
    let drift = with(&["drift"], &[&own, "--data", &other, "--window", "512", "--html"]);
    let compare = ["compare", &at("lora"), &at("smore"), "--html"].map(str::to_owned).to_vec();
    let routes = ["routes", &at("alarmed"), "--html"].map(str::to_owned).to_vec();
    for (name, mut args) in
        [("trace", trace), ("drift", drift), ("compare", compare), ("routes", routes)]
    {
        args.push(at(&format!("{name}.html")));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        // Drift says by its exit code that there is some.
        let done = program(&args);
        if name != "drift" {
            done?;
        }
    }
    let pages = [
        "lora/report.html",
        "smore/report.html",
        "alarmed/report.html",
        "trace.html",
        "drift.html",
        "compare.html",
        "routes.html",
    ];
    let pages: Vec<PathBuf> = pages.iter().map(|page| out.join(page)).collect();
    for page in &pages {
        ensure!(page.is_file(), "{} was not written", page.display());
    }
    Ok(pages)
}

fn program(args: &[&str]) -> Result<()> {
    let all = ["run", "--quiet", "--package", "smore-cli", "--"];
    cargo(&all.iter().chain(args).copied().collect::<Vec<_>>(), &[])
}

fn text_of(path: &Path) -> Result<String> {
    Ok(path.to_str().context("path is not UTF-8")?.to_owned())
}

/// Opens a page in a frame of exactly `width` pixels, hovers over tokens where there are some, and
/// returns what its console says.
fn look(
    chromium: &str,
    out: &Path,
    page: &Path,
    width: u32,
    (theme, number): (&str, u32),
) -> Result<Vec<String>> {
    let name = text_of(page.strip_prefix(out)?)?.replace(['/', '.'], "-");
    let frame = out.join(format!(".{name}.html"));
    let inside = text_of(&page.canonicalize()?)?;
    let height = 2400;
    fs::write(
        &frame,
        format!(
            "<body style='margin:0'><iframe id=f src='file://{inside}' \
             style='border:0;width:{width}px;height:{height}px'></iframe><script>f.onload=()=>{{
const d=f.contentDocument,e=d.documentElement;
if(e.scrollWidth>{width})console.error('wider than the screen: '+e.scrollWidth);
const tokens=[...d.querySelectorAll('#text span')];
if(tokens.length){{const start=performance.now();
for(const t of tokens)t.dispatchEvent(new MouseEvent('mouseover',{{bubbles:true}}));
const each=(performance.now()-start)/tokens.length;
if(each>{FRAME})console.error('a hover takes '+each+' ms');}}}}</script></body>"
        ),
    )?;
    let profile = out.canonicalize()?.join(".profile");
    let picture = out.join(format!("{name}-{width}-{theme}.png"));
    let output = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--allow-file-access-from-files", "--enable-logging=stderr"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--blink-settings=preferredColorScheme={number}"))
        .arg(format!("--window-size={width},{height}"))
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("file://{}", frame.canonicalize()?.display()))
        .output()?;
    ensure!(picture.is_file(), "Chromium took no picture of {}", page.display());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines = said.lines().filter(|line| line.contains("CONSOLE"));
    Ok(lines.map(|line| format!("{name}, {width} pixels, {theme}: {line}")).collect())
}
