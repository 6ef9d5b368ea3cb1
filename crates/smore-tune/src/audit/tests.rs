use super::*;
use std::path::PathBuf;

fn record(text: &str) -> Record {
    let asked = Asked {
        prompt: text,
        ids: &[1, 2, 3],
        layout: PromptLayout::Raw,
        max_new_tokens: 8,
        sampling: Sampling { temperature: 0.1, top_p: 0.9, top_k: 0, seed: 3 },
    };
    let generated = Generated {
        prompt_tokens: 3,
        ids: vec![4],
        text: "out".into(),
        finish_reason: FinishReason::Length,
    };
    let made = Made { base: BaseFiles::default(), adapter: BTreeMap::new() };
    let time = "2026-01-01T00:00:00Z".to_owned();
    Record::new(time, made, &asked, &generated, RoutingDigest::default(), true)
}

fn log() -> (tempfile::TempDir, PathBuf, Vec<Head>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let log = Log::open(&path).unwrap();
    let texts = ["a", "b ,\"hash\":\" c", "\u{e9}\n\"", "d"];
    let heads = texts.map(|text| log.append(record(text)).unwrap());
    (dir, path, heads.to_vec())
}

#[test]
fn an_honest_log_has_no_fault_and_holds_every_head() {
    let (_dir, path, heads) = log();
    let chain = read(&path).unwrap();
    assert_eq!(chain.faults, []);
    assert_eq!(&chain.head(), heads.last().unwrap());
    assert!(heads.iter().all(|head| chain.holds(&head.hash)));
    assert_eq!(chain.records[0].1.previous, GENESIS);
    assert_eq!(chain.records[2].1.prompt.as_deref(), Some("\u{e9}\n\""));
    // Opening does not begin anew.
    assert_eq!(Log::open(&path).unwrap().append(record("e")).unwrap().number, 5);
}

/// Every byte, in turn, with one bit flipped.
#[test]
fn any_flipped_byte_is_found() {
    let (_dir, path, _) = log();
    let bytes = std::fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        let line = bytes[..at].split(|&b| b == b'\n').count();
        let faults = read(&path).unwrap().faults;
        assert!(faults.first().is_some_and(|f| f.line == line), "byte {at}: {faults:?}");
    }
}

#[test]
fn removed_reordered_and_doubled_records_are_found_where_they_are() {
    let (_dir, path, _) = log();
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    for (order, line) in [
        (vec![1, 2, 3], 1),
        (vec![0, 2, 3], 2),
        (vec![0, 1, 3], 3),
        (vec![0, 2, 1, 3], 2),
        (vec![1, 0, 2, 3], 1),
        (vec![0, 1, 1, 2, 3], 3),
    ] {
        std::fs::write(&path, order.iter().map(|&i| lines[i]).collect::<String>()).unwrap();
        let faults = read(&path).unwrap().faults;
        assert!(faults[0].line == line && faults[0].record.is_some(), "{order:?}: {faults:?}");
    }
}

#[test]
fn a_missing_end_shows_by_a_noted_head_alone() {
    let (_dir, path, heads) = log();
    let text = std::fs::read_to_string(&path).unwrap();
    let short: String = text.split_inclusive('\n').take(3).collect();
    std::fs::write(&path, short).unwrap();
    let chain = read(&path).unwrap();
    assert_eq!(chain.faults, []);
    assert!(chain.holds(&heads[2].hash) && !chain.holds(&heads[3].hash));
}

/// A kill in the middle of a write: reported, and never extended.
#[test]
fn half_a_line_is_reported_and_never_extended() {
    let (_dir, path, _) = log();
    let bytes = std::fs::read(&path).unwrap();
    let third = bytes.iter().enumerate().filter(|(_, b)| **b == b'\n').nth(2).unwrap().0 + 1;
    for end in [third + 1, third + 40, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..end]).unwrap();
        let chain = read(&path).unwrap();
        assert_eq!((chain.records.len(), chain.faults[0].line), (3, 4));
        let said = Log::open(&path).err().unwrap().to_string();
        assert!(said.contains("half a line") && said.contains("new log"), "{said}");
        assert_eq!(std::fs::read(&path).unwrap(), &bytes[..end]);
    }
}

#[test]
fn many_writers_make_one_chain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let log = Log::open(&path).unwrap();
                (0..5).for_each(|_| drop(log.append(record("x")).unwrap()));
            });
        }
    });
    let chain = read(&path).unwrap();
    assert_eq!((chain.records.len(), chain.faults), (20, vec![]));
}

#[test]
fn what_differs_is_said() {
    let old = record("a");
    assert_eq!(difference(&old, &old), Difference::None);
    let with = |change: fn(&mut Record)| {
        let mut new = record("a");
        change(&mut new);
        difference(&old, &new)
    };
    assert_eq!(with(|r| r.gate_weights_sha256.clear()), Difference::Rounding);
    let changes: [fn(&mut Record); 4] = [
        |r| r.prompt_ids_sha256.clear(),
        |r| r.output_ids_sha256.clear(),
        |r| r.output_sha256.clear(),
        |r| r.routing.push(String::new()),
    ];
    for change in changes {
        assert!(matches!(with(change), Difference::Other(_)));
    }
}
