//! A run that is killed, interrupted or starved of disk goes on to the bit.

mod workplace;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use workplace::{refused, smore, write_run};

/// A run of 60 steps with everything that has a state: packs of samples, noise, dropout, warm-up,
/// evaluations, the best values.
fn config(save_steps: usize) -> impl Fn(String) -> String {
    move |config| {
        let config = config
            .replace("max_steps: 6", "max_steps: 60")
            .replace("save_steps: 3", &format!("save_steps: {save_steps}"))
            .replace("eval_steps: 3", "eval_steps: 7")
            .replace("kind: switch", "kind: noisy_topk")
            .replace("seed: 42", "seed: 42, lora_dropout: 0.1, load_best_model_at_end: true")
            .replace("seed: 42", "seed: 42, save_total_limit: 2, group_by_length: true");
        assert!(config.contains("max_steps: 60") && config.contains("noisy_topk"));
        config
            + "health: {window_steps: 4, patience: 1, min_tokens: 1, max_imbalance: 0.05, \
               raise_balance_weight: true, trace_tokens: 2}\n"
    }
}

fn adapter(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap()
}

/// What `metrics.jsonl` says, but for the time.
fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line| {
        let mut json: Value = serde_json::from_str(line).unwrap();
        let fields = json.as_object_mut().unwrap();
        fields.retain(|key, _| key != "seconds" && key != "resident_memory_bytes");
        json
    };
    text.lines().map(line).collect()
}

/// Every window of counts, and how many alarms were answered.
fn statistics(run: &Path) -> (Vec<String>, usize) {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let answered = text.lines().filter(|line| line.contains("\"balance_weight\":[")).count();
    assert!(answered > 0, "no alarm was answered, so nothing of it is tested");
    let windows = smore_tune::routing::read_run(run).unwrap();
    assert!(windows.len() > 60 / 4, "{}", windows.len());
    (windows.iter().map(|w| format!("{w:?}")).collect(), answered)
}

fn start(folder: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smore"));
    command.current_dir(folder).args(args).env("RAYON_NUM_THREADS", "1");
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn checkpoints(run: &Path) -> Vec<usize> {
    let Ok(entries) = std::fs::read_dir(run) else { return vec![] };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<usize> =
        names.filter_map(|n| n.strip_prefix("checkpoint-")?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_mins(2), "nothing happened for two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Trains without a break, and says how long that took.
fn reference(folder: &Path) -> (PathBuf, Duration) {
    write_run(folder, "whole", config(1));
    let start = Instant::now();
    smore(folder, &["train", "whole.yaml"]).env("RAYON_NUM_THREADS", "1").assert().success();
    (folder.join("whole"), start.elapsed())
}

#[test]
fn twenty_kills_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let (whole, took) = reference(folder);
    // A checkpoint after every step, so that many kills fall into the writing of one.
    write_run(folder, "killed", config(1));
    let run = folder.join("killed");
    let mut seed = 12345u64;
    let (mut kills, mut midway) = (0, 0);
    let same = || {
        assert!(adapter(&run) == adapter(&whole));
        assert_eq!(metrics(&run), metrics(&whole));
        assert_eq!(statistics(&run), statistics(&whole));
        let traces =
            |run: &Path| std::fs::read_to_string(run.join("routing/traces.jsonl")).unwrap();
        assert_eq!(traces(&run), traces(&whole));
    };
    while kills < 20 {
        let mut child = start(folder, &["train", "--resume", "killed.yaml"]);
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // From the start of the program to somewhat more than a sixth of the run.
        std::thread::sleep(took.mul_f64(0.18 * (seed >> 33) as f64 / f64::from(1u32 << 31)));
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        midway += usize::from(!checkpoints(&run).is_empty());
        if run.join("report.html").exists() {
            // The run was faster than the kills: another one.
            same();
            std::fs::remove_dir_all(&run).unwrap();
        }
    }
    assert!(midway >= 5, "only {midway} kills of 20 came behind a checkpoint");
    smore(folder, &["train", "--resume", "killed.yaml"]).assert().success();
    same();
    assert_eq!(checkpoints(&run), [58, 59], "save_total_limit");
    let left: Vec<_> = std::fs::read_dir(&run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with(".writing") || name.starts_with(".removing"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let said = refused(folder, &["train", "--resume", "killed.yaml"]);
    assert!(said.contains("this run has ended"), "{said}");
}

#[test]
fn ctrl_c_writes_a_checkpoint_and_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let (whole, _) = reference(folder);
    write_run(folder, "stopped", config(0));
    let run = folder.join("stopped");
    let child = start(folder, &["train", "stopped.yaml"]);
    let lines = |run: &Path| {
        std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default().lines().count()
    };
    wait_for(|| lines(&run) > 5);
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    // Another run may not write here meanwhile.
    let other = smore(folder, &["train", "--resume", "stopped.yaml"]).output().unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("smore train --resume stopped.yaml"), "{said}");
    let other = String::from_utf8(other.stderr).unwrap();
    assert!(other.contains("another run is writing this folder"), "{other}");
    let [step] = checkpoints(&run)[..] else { panic!("{:?}", checkpoints(&run)) };
    assert!(run.join(format!("checkpoint-{step}/adapter_config.json")).is_file());
    // The run folder stands for its config.
    smore(folder, &["train", "--resume", "stopped"]).assert().success();
    assert!(adapter(&run) == adapter(&whole), "after an interrupt at step {step}");
    assert_eq!(metrics(&run), metrics(&whole));
}

/// A run that was killed behind its second checkpoint.
fn killed(folder: &Path, name: &str) -> PathBuf {
    write_run(folder, name, config(5));
    let run = folder.join(name);
    let mut child = start(folder, &["train", &format!("{name}.yaml")]);
    wait_for(|| checkpoints(&run).len() >= 2);
    child.kill().unwrap();
    child.wait().unwrap();
    run
}

#[test]
fn damaged_checkpoints_are_skipped_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let (whole, _) = reference(folder);
    let run = killed(folder, "damaged");
    let newest = *checkpoints(&run).last().unwrap();
    let file = run.join(format!("checkpoint-{newest}/training_state.safetensors"));
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let output = smore(folder, &["train", "--resume", "damaged.yaml"]).assert().success();
    let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    let name = format!("checkpoint-{newest}/training_state.safetensors");
    assert!(said.contains("skipped a damaged checkpoint") && said.contains(&name), "{said}");
    assert!(adapter(&run) == adapter(&whole));

    let run = killed(folder, "cut");
    let all = checkpoints(&run);
    for (i, step) in all.iter().enumerate() {
        let checkpoint = run.join(format!("checkpoint-{step}"));
        if i == 0 {
            std::fs::remove_file(checkpoint.join("checkpoint.json")).unwrap();
        } else {
            let file = checkpoint.join("adapter_model.safetensors");
            let bytes = std::fs::read(&file).unwrap();
            std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        }
    }
    let said = refused(folder, &["train", "--resume", "cut.yaml"]);
    assert!(said.contains("no whole checkpoint is left"), "{said}");
    assert!(all.iter().all(|step| said.contains(&format!("checkpoint-{step}/"))), "{said}");
}

#[test]
fn another_config_base_or_data_is_refused_with_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let run = killed(folder, "run");
    let before = checkpoints(&run);
    let changed = |change: &dyn Fn(String) -> String| {
        write_run(folder, "run", |text| change(config(5)(text)));
        refused(folder, &["train", "--resume", "run.yaml"])
    };
    let said = changed(&|c| c.replace("seed: 42", "seed: 43").replace("rank: 2}", "rank: 3}"));
    for part in [
        "train.seed was 42 and is 43",
        "adapter.layers.0.rank was 2 and is 3",
        "adapter.layers.1.rank was 2 and is 3",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!said.contains("learning_rate"), "{said}");
    write_run(folder, "run", config(5));
    let data = folder.join("data.jsonl");
    let text = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&data, text.replacen("order 7", "order 8", 1)).unwrap();
    let said = refused(folder, &["train", "--resume", "run.yaml"]);
    assert!(said.contains("the data in data.jsonl has changed"), "{said}");
    assert_eq!(checkpoints(&run), before);
    // What does not enter the result may change.
    write_run(folder, "run", config(9));
    smore(folder, &["train", "--resume", "run.yaml"]).assert().success();
    let (whole, _) = reference(folder);
    assert!(adapter(&run) == adapter(&whole));
}

/// Writing fails as on a full disk: by a limit on the size of files, which needs no rights, and on
/// a real full file system where the rights to mount one are there.
#[test]
#[cfg(target_os = "linux")]
#[allow(clippy::print_stderr, reason = "a test that is left out says so")]
fn a_full_disk_leaves_the_earlier_checkpoint_whole() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let (whole, _) = reference(folder);
    let disk = folder.join("disk");
    std::fs::create_dir(&disk).unwrap();
    // Room for one checkpoint and a part of the next.
    let run_in = |size: &str, name: &str| {
        let at = disk.to_str().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", at])
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            return None;
        }
        write_run(folder, name, |c| {
            config(5)(c).replace(&format!("output_dir: {name}"), "output_dir: disk/run")
        });
        Some(())
    };
    let one: u64 = {
        let run = killed(folder, "size");
        let newest = checkpoints(&run)[0];
        let files = std::fs::read_dir(run.join(format!("checkpoint-{newest}"))).unwrap();
        files.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    };
    if run_in(&format!("{}k", one * 3 / 2 / 1024), "full").is_none() {
        assert!(std::env::var_os("CI").is_none(), "CI must be able to mount a tmpfs");
        eprintln!("not tested: no right to mount a file system");
        return;
    }
    let output = smore(folder, &["train", "full.yaml"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let left = checkpoints(&disk.join("run"));
    let remount = Command::new("mount")
        .args(["-o", "remount,size=64m", disk.to_str().unwrap()])
        .status()
        .unwrap();
    let resumed = smore(folder, &["train", "--resume", "full.yaml"]).output().unwrap();
    let same = resumed.status.success() && adapter(&disk.join("run")) == adapter(&whole);
    Command::new("umount").arg(&disk).status().unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in ["checkpoint-10 was not written", "checkpoint-5 is whole", "--resume", "No space"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(left, [5]);
    assert!(remount.success() && same, "{}", String::from_utf8_lossy(&resumed.stderr));
}

#[test]
fn trainer_state_and_events_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, _) = reference(dir.path());
    for folder in [whole.clone(), whole.join("checkpoint-59")] {
        let text = std::fs::read_to_string(folder.join("trainer_state.json")).unwrap();
        let state: Value = serde_json::from_str(&text).unwrap();
        let keys: Vec<&String> = state.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            [
                "best_global_step",
                "best_metric",
                "best_model_checkpoint",
                "epoch",
                "eval_steps",
                "global_step",
                "is_hyper_param_search",
                "is_local_process_zero",
                "is_world_process_zero",
                "log_history",
                "logging_steps",
                "max_steps",
                "num_input_tokens_seen",
                "num_train_epochs",
                "save_steps",
                "stateful_callbacks",
                "total_flos",
                "train_batch_size",
                "trial_name",
                "trial_params",
            ]
        );
        let history = state["log_history"].as_array().unwrap();
        let steps = history.iter().filter(|line| line.get("loss").is_some()).count();
        assert_eq!(Some(steps as u64), state["global_step"].as_u64());
        assert_eq!(state["max_steps"], 60);
    }
    let events = std::fs::read_dir(whole.join("runs")).unwrap().next().unwrap().unwrap();
    assert!(events.file_name().to_str().unwrap().starts_with("events.out.tfevents."));
    assert!(events.metadata().unwrap().len() > 60 * 100);
}
