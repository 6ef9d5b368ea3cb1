//! Processes that do the work. One holds one case, so that its peak of memory is that case's alone.
//! Ours and PyTorch's speak the same lines: `bench/peer/peer.py` says which.

use crate::case::Case;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A process with a case prepared.
pub(crate) struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    name: String,
}

impl Worker {
    /// This program as a worker.
    pub(crate) fn ours(case: &Case) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--worker");
        Self::start(command, case, "smore")
    }

    /// PyTorch as a worker.
    pub(crate) fn peer(python: &str, case: &Case) -> Result<Self> {
        let mut command = Command::new(python);
        command.arg("-W").arg("ignore").arg("bench/peer/peer.py");
        Self::start(command, case, "peer")
    }

    fn start(mut command: Command, case: &Case, name: &str) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no output of the worker")?);
        let mut worker = Self { child, input, output, name: name.to_owned() };
        let answer = worker.ask(&json!({ "prepare": case }))?;
        ensure!(answer["ready"] == true, "{name} did not prepare {case:?}: {answer}");
        Ok(worker)
    }

    /// Does the work once; seconds.
    pub(crate) fn run(&mut self) -> Result<f64> {
        self.ask(&json!({ "run": true }))?["seconds"].as_f64().context("seconds of a run")
    }

    /// Ends the process; what it says of its memory.
    pub(crate) fn end(mut self) -> Result<Value> {
        self.input = None;
        let answer = self.answer()?;
        ensure!(self.child.wait()?.success(), "the {} worker failed", self.name);
        Ok(answer)
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let input = self.input.as_mut().context("the worker has ended")?;
        writeln!(input, "{request}").with_context(|| format!("{} has ended", self.name))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the {} worker ended without an answer", self.name);
        serde_json::from_str(&line).with_context(|| format!("{} said {line}", self.name))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.input = None;
        // A worker that has ended is no error here.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
