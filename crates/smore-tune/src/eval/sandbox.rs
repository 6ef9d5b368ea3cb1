//! Runs programs nobody has read: in namespaces of their own by bubblewrap, without network, with
//! a system that cannot be written, no home folder, a small folder in memory, and limits on
//! memory, processes and time.

use crate::error::{Error, Result};
use rand::RngExt;
use rustix::process::{getpriority_process, setpriority_process};
use serde::Serialize;
use smore::rng::{Purpose, stream};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What a program may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time it may run.
    pub time: Duration,
    /// Memory of all its processes, in bytes.
    pub memory: u64,
    /// Processes and threads at once.
    pub processes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { time: Duration::from_secs(10), memory: 1 << 30, processes: 32 }
    }
}

/// Bytes of the folder that a program may write in.
const DISK: u64 = 16 << 20;
/// Bytes that are kept of what a program says.
const KEPT: usize = 4096;
/// Between looks at what a program takes.
const LOOK: Duration = Duration::from_millis(10);

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", content = "why", rename_all = "snake_case")]
pub enum Outcome {
    /// It came to its end.
    Passed,
    /// It failed, with the last thing it said.
    Failed(String),
    /// It was stopped at a limit.
    Stopped(String),
}

impl Outcome {
    /// It came to its end.
    pub fn passed(&self) -> bool {
        *self == Self::Passed
    }
}

/// Bubblewrap and Python, both tried.
#[derive(Clone, Debug)]
pub struct Sandbox {
    bwrap: PathBuf,
    python: PathBuf,
    limits: Limits,
    /// Whether bubblewrap itself runs as nobody.
    as_nobody: bool,
}

/// The user and group that own nothing.
const NOBODY: u32 = 65534;

/// Sets limits that cannot be raised again, then becomes the program. The program comes on
/// standard input, so that no file of ours is in its sight.
const LAUNCHER: &str = "\
import resource as r, sys
m, p, t, d = map(int, sys.argv[1:5])
for what, much in ((r.RLIMIT_AS, m), (r.RLIMIT_NPROC, p), (r.RLIMIT_CPU, t),
                   (r.RLIMIT_FSIZE, d), (r.RLIMIT_CORE, 0), (r.RLIMIT_NOFILE, 64)):
    r.setrlimit(what, (much, much))
source = sys.stdin.buffer.read()
sys.argv = ['program.py']
exec(compile(source, 'program.py', 'exec'), {'__name__': '__main__'})
";

impl Sandbox {
    /// Looks for what is needed and runs an empty program with it.
    ///
    /// # Errors
    /// Says what is missing and how to get it.
    pub fn open(limits: Limits) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let bwrap = std::env::split_paths(&path).map(|p| p.join("bwrap")).find(|p| p.is_file());
        let bwrap = bwrap.ok_or_else(|| {
            Error::Run(
                "programs are only run in a sandbox, and bubblewrap is not installed; install \
                 the package `bubblewrap`, which brings the command `bwrap`"
                    .into(),
            )
        })?;
        // Only the system's own is within the sandbox's sight.
        let python = ["/usr/bin/python3", "/usr/local/bin/python3"].map(PathBuf::from);
        let python = python.into_iter().find(|p| p.exists()).ok_or_else(|| {
            Error::Run(
                "HumanEval's programs are Python, and there is no python3 in /usr/bin or \
                 /usr/local/bin; install the system's package `python3`"
                    .into(),
            )
        })?;
        let mut sandbox = Self { bwrap, python, limits, as_nobody: false };
        // The system's limit on processes does not bind root, not even in a namespace, and looking
        // every 10 ms is late for a fork bomb. Some containers let only root make namespaces.
        if rustix::process::geteuid().is_root() {
            sandbox.as_nobody = true;
            if sandbox.run("pass").is_ok_and(|o| o.passed()) {
                return Ok(sandbox);
            }
            sandbox.as_nobody = false;
        }
        match sandbox.run("pass")? {
            Outcome::Passed => Ok(sandbox),
            Outcome::Failed(why) | Outcome::Stopped(why) => Err(Error::Run(format!(
                "bubblewrap cannot make its sandbox here: {}; allow unprivileged user namespaces \
                 (in a container: run it with permission to create them)",
                why.trim()
            ))),
        }
    }

    /// Runs a Python program to its end or to a limit.
    ///
    /// # Errors
    /// If bubblewrap cannot be started; whatever the program does is an [`Outcome`].
    pub fn run(&self, source: &str) -> Result<Outcome> {
        // Said only at the very end, so that leaving early is no success.
        let token = format!("{:032x}", stream(nonce(), Purpose::Sampling, 0, 0).random::<u128>());
        let source = format!("{source}\nprint('\\n{token}')\n");
        let failed = |source| Error::Io { path: self.bwrap.clone(), source };
        let mut child = self.command().spawn().map_err(failed)?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = thread::spawn(move || {
            // A program that is stopped does not read to the end.
            let _ = stdin.map(|mut s| s.write_all(source.as_bytes()));
        });
        let said = thread::spawn(move || tail(stdout));
        let complained = thread::spawn(move || tail(stderr));
        let stopped = self.watch(&mut child).map_err(failed)?;
        let status = child.wait().map_err(failed)?;
        let _ = feed.join();
        let said = said.join().unwrap_or_default();
        let complained = complained.join().unwrap_or_default();
        if let Some(why) = stopped {
            return Ok(Outcome::Stopped(why));
        }
        if status.success() && said.trim_end().ends_with(&token) {
            return Ok(Outcome::Passed);
        }
        let last = complained.lines().rev().find(|l| !l.trim().is_empty());
        let why = last.map_or_else(|| format!("ended early with {status}"), String::from);
        Ok(Outcome::Failed(why))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.bwrap);
        if self.as_nobody {
            command.uid(NOBODY).gid(NOBODY).current_dir("/");
        }
        command.args(["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]);
        command.args(["--cap-drop", "ALL", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin"]);
        command.args([
            "--uid",
            &NOBODY.to_string(),
            "--gid",
            &NOBODY.to_string(),
            "--hostname",
            "sandbox",
        ]);
        command.args(["--ro-bind", "/usr", "/usr"]);
        for place in ["/lib", "/lib32", "/lib64", "/bin", "/etc/alternatives"] {
            command.args(["--ro-bind-try", place, place]);
        }
        command.args(["--dev-bind", "/dev/null", "/dev/null", "--proc", "/proc"]);
        command.args(["--size", &DISK.to_string(), "--tmpfs", "/tmp", "--chdir", "/tmp"]);
        command.args(["--remount-ro", "/"]);
        command.arg("--").arg(&self.python).args(["-I", "-c", LAUNCHER]);
        let Limits { time, memory, processes } = self.limits;
        for limit in [memory, processes, time.as_secs().max(1) + 1, DISK] {
            command.arg(limit.to_string());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Waits; kills everything at a limit and says which. Limits of the system are for a process
    /// alone, or do not bind root: here all processes count together.
    fn watch(&self, child: &mut Child) -> std::io::Result<Option<String>> {
        let start = Instant::now();
        let _first = First::now();
        loop {
            if child.try_wait()?.is_some() {
                return Ok(None);
            }
            // Bubblewrap's own two are not the program's.
            let most = self.limits.processes + 2;
            let (processes, memory) = taken(child.id(), most);
            let over = if start.elapsed() > self.limits.time {
                Some(format!("after {} s", self.limits.time.as_secs_f64()))
            } else if processes > most {
                Some(format!("at more than {} processes", self.limits.processes))
            } else if memory > self.limits.memory {
                Some(format!("at {} MiB of memory", memory >> 20))
            } else {
                None
            };
            if over.is_some() {
                // The first process of the namespace dies with bubblewrap, and all others with it.
                child.kill()?;
                return Ok(over);
            }
            thread::sleep(LOOK);
        }
    }
}

/// The thread that looks goes before what it looks at, where it may: as root, whom the system's limit on
/// processes does not bind, programs can be thousands of processes before it gets its turn.
struct First {
    before: Option<i32>,
}

impl First {
    fn now() -> Self {
        let before = getpriority_process(None).ok();
        Self { before: before.filter(|_| setpriority_process(None, -20).is_ok()) }
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = setpriority_process(None, before);
        }
    }
}

/// A number that no program can know.
fn nonce() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(Instant::now())
}

/// Reads to the end and keeps the last bytes.
fn tail(from: Option<impl Read>) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 8192];
    if let Some(mut from) = from {
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            kept.extend_from_slice(&buffer[..n]);
            let cut = kept.len().saturating_sub(KEPT);
            kept.drain(..cut);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Processes below and with `root`, and their resident memory in bytes. Counts one more than `most`
/// and no further: a program may make processes faster than they can be counted.
fn taken(root: u32, most: u64) -> (u64, u64) {
    let (mut processes, mut memory) = (0, 0);
    let mut waiting = vec![root];
    while processes <= most
        && let Some(pid) = waiting.pop()
    {
        let folder = Path::new("/proc").join(pid.to_string());
        processes += 1;
        let pages = fs::read_to_string(folder.join("statm")).unwrap_or_default();
        let pages = pages.split(' ').nth(1).and_then(|p| p.parse::<u64>().ok()).unwrap_or(0);
        memory += pages * rustix::param::page_size() as u64;
        for thread in fs::read_dir(folder.join("task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            waiting.extend(children.split_whitespace().filter_map(|c| c.parse::<u32>().ok()));
        }
    }
    (processes, memory)
}

#[cfg(test)]
mod tests;
