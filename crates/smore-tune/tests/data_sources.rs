//! Every way to describe a data file changes what is read from it as it says.

mod table;

use serde_json::{Value, json};
use smore_tune::config::DataConfig;
use smore_tune::data::{self, Dataset, Sample};
use smore_tune::template::Template;
use smore_tune::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};

fn tokenizer() -> Tokenizer {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../smore-cli/assets/demo-base");
    Tokenizer::open(&base).unwrap()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Loads sources whose paths are names in this folder; nothing is held out.
    fn load(&self, sources: Value) -> Dataset {
        self.load_with(sources, &Template::plain(&tokenizer())).unwrap()
    }

    fn load_with(&self, mut sources: Value, template: &Template) -> Result<Dataset, String> {
        for source in sources.as_array_mut().unwrap() {
            if let Some(name) = source["path"].as_str() {
                source["path"] = json!(self.path(name));
            }
        }
        let config: DataConfig =
            serde_json::from_value(json!({"train": sources, "validation": {"fraction": 0}}))
                .unwrap();
        data::load(&config, 1, &tokenizer(), template).map_err(|error| error.to_string())
    }

    /// The tokens of one source's samples, and what of them is trained.
    fn tokens(&self, source: Value) -> Vec<(Vec<u32>, Vec<bool>)> {
        let one = |s: &Sample| (s.ids().to_vec(), s.trained().to_vec());
        self.load(json!([source])).train.iter().map(one).collect()
    }
}

/// The trained text of every sample.
fn trained(data: &Dataset) -> Vec<String> {
    let text = |sample: &Sample| {
        let marked = sample.ids().iter().zip(sample.trained()).filter(|(_, trained)| **trained);
        let ids: Vec<u32> = marked.map(|(id, _)| *id).collect();
        tokenizer().decode(&ids, true).unwrap()
    };
    data.train.iter().map(text).collect()
}

#[test]
fn columns_rename_and_leave_out() {
    let folder = Folder::new();
    folder.write(
        "ours.jsonl",
        "{\"instruction\": \"Stop the press\", \"input\": \"now\", \"output\": \"done\"}\n",
    );
    folder.write("theirs.jsonl", "{\"q\": \"Stop the press\", \"x\": \"now\", \"a\": \"done\"}\n");
    let columns = json!({"instruction": "q", "input": "x", "output": "a"});
    let ours = folder.tokens(json!({"path": "ours.jsonl"}));
    assert_eq!(ours, folder.tokens(json!({"path": "theirs.jsonl", "columns": columns})));
    let bare = folder.tokens(json!({"path": "ours.jsonl", "columns": {"input": null}}));
    assert!(bare[0].0.len() < ours[0].0.len(), "a column that is null is not read");
}

#[test]
fn tags_name_roles_and_keys() {
    let folder = Folder::new();
    let ours = json!({"conversations": [
        {"from": "system", "value": "Be short"}, {"from": "human", "value": "Status?"},
        {"from": "function_call", "value": "{\"name\": \"status\", \"arguments\": {}}"},
        {"from": "observation", "value": "ready"}, {"from": "gpt", "value": "It is ready"},
    ]});
    folder.write("ours.jsonl", &ours.to_string());
    let mut theirs = ours.to_string();
    for (from, to) in [
        ("\"from\"", "\"who\""),
        ("\"value\"", "\"what\""),
        ("\"system\"", "\"scene\""),
        ("\"human\"", "\"user\""),
        ("\"function_call\"", "\"call\""),
        ("\"observation\"", "\"result\""),
        ("\"gpt\"", "\"model\""),
    ] {
        assert!(theirs.contains(from), "{from}");
        theirs = theirs.replace(from, to);
    }
    folder.write("theirs.jsonl", &theirs);
    let tags = json!({
        "role_tag": "who", "content_tag": "what", "system_tag": "scene", "user_tag": "user",
        "assistant_tag": "model", "function_tag": "call", "observation_tag": "result",
    });
    let all = folder.tokens(json!({"path": "theirs.jsonl", "tags": tags}));
    assert_eq!(folder.tokens(json!({"path": "ours.jsonl"})), all);
    // Each of them is needed.
    for tag in tags.as_object().unwrap().keys() {
        let mut fewer = tags.clone();
        fewer.as_object_mut().unwrap().remove(tag);
        let source = json!([{"path": "theirs.jsonl", "tags": fewer, "format": "sharegpt"}]);
        let plain = Template::plain(&tokenizer());
        folder.load_with(source, &plain).expect_err(tag);
    }
}

fn numbered(n: usize, name: &str) -> String {
    let line = |i| format!("{{\"prompt\": \"{name} {i}\", \"completion\": \"done\"}}\n");
    (0..n).map(line).collect()
}

#[test]
fn weights_repeat_and_thin_out_one_file_alone() {
    let folder = Folder::new();
    folder.write("a.jsonl", &numbered(20, "a"));
    folder.write("b.jsonl", &numbered(20, "b"));
    let count = |weight: f64| {
        let data = folder.load(json!([{"path": "a.jsonl", "weight": weight}, {"path": "b.jsonl"}]));
        let mut times = vec![0; 21];
        for sample in data.train.iter().filter(|s| s.origin.file.ends_with("a.jsonl")) {
            times[sample.origin.line] += 1;
        }
        let others = data.train.iter().filter(|s| s.origin.file.ends_with("b.jsonl")).count();
        assert_eq!(others, 20);
        times.remove(0);
        times
    };
    assert_eq!(count(1.0), [1; 20]);
    assert_eq!(count(3.0), [3; 20]);
    for (weight, low, n_high) in [(0.5, 0, 10), (2.5, 2, 10), (1.25, 1, 5)] {
        let times = count(weight);
        assert_eq!(times.iter().filter(|&&t| t == low + 1).count(), n_high, "{weight}");
        assert_eq!(times.iter().filter(|&&t| t == low).count(), 20 - n_high, "{weight}");
        assert_ne!(&times[..n_high], vec![low + 1; n_high], "{weight}: drawn, not the first ones");
    }
}

#[test]
fn held_out_samples_are_not_repeated() {
    let folder = Folder::new();
    let config: DataConfig = serde_json::from_value(json!({
        "train": [{"path": folder.write("a.jsonl", &numbered(20, "a")), "weight": 3}],
        "validation": {"fraction": 0.25},
    }))
    .unwrap();
    let tokenizer = tokenizer();
    let data = data::load(&config, 1, &tokenizer, &Template::plain(&tokenizer)).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (45, 5));
}

#[test]
fn max_samples_of_a_file_limits_that_file() {
    let folder = Folder::new();
    folder.write("a.jsonl", &numbered(20, "a"));
    folder.write("b.jsonl", &numbered(20, "b"));
    let sources = json!([{"path": "a.jsonl", "max_samples": 5}, {"path": "b.jsonl"}]);
    let data = folder.load(sources);
    let of = |name: &str| -> Vec<usize> {
        let of = data.train.iter().filter(|s| s.origin.file.ends_with(name));
        of.map(|s| s.origin.line).collect()
    };
    assert_eq!((of("a.jsonl").len(), of("b.jsonl").len()), (5, 20));
    assert!(of("a.jsonl").is_sorted() && of("a.jsonl") != [1, 2, 3, 4, 5]);
}

#[test]
fn a_list_of_data_sets_says_it_all() {
    let folder = Folder::new();
    folder.write(
        "chats.json",
        &json!([{"talk": [
            {"who": "user", "what": "Status?"}, {"who": "model", "what": "It is ready"},
        ]}])
        .to_string(),
    );
    folder.write(
        "dataset_info.json",
        &json!({"mine": {
            "file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "user",
                "assistant_tag": "model"},
        }})
        .to_string(),
    );
    let dir = folder.path("");
    let named = folder.load(json!([{"dataset": "mine", "dataset_dir": dir}]));
    assert_eq!(trained(&named), ["It is ready"]);
}

#[test]
fn tables_hold_what_json_holds() {
    let folder = Folder::new();
    let prompts = ["Start \"slowly\", then\nstop", "Größe in µm?", ""].map(String::from);
    let completions = ["ok", "12 µm", "nothing, \"asked\""].map(String::from);
    let lines = prompts.iter().zip(&completions).map(|(prompt, completion)| {
        format!("{}\n", json!({"prompt": prompt, "completion": completion}))
    });
    folder.write("a.jsonl", &lines.collect::<String>());
    let quoted = |s: &String| format!("\"{}\"", s.replace('"', "\"\""));
    let rows = prompts.iter().zip(&completions);
    let rows: Vec<_> = rows.map(|(p, c)| format!("{},{}\r\n", quoted(p), quoted(c))).collect();
    let rows = rows.concat();
    folder.write("a.csv", &format!("prompt,completion\r\n{rows}"));
    let columns = [("prompt", prompts.to_vec()), ("completion", completions.to_vec())];
    // Two groups of rows, so that the second is read too.
    table::strings(&folder.path("a.parquet"), &columns, 2);
    let expected = folder.tokens(json!({"path": "a.jsonl"}));
    assert_eq!(expected.len(), 3);
    assert_eq!(expected, folder.tokens(json!({"path": "a.csv"})));
    assert_eq!(expected, folder.tokens(json!({"path": "a.parquet"})));
}

#[test]
fn lists_in_tables_are_conversations() {
    let folder = Folder::new();
    let rows = [
        vec![("user", "Status?"), ("assistant", "ready"), ("user", "Go"), ("assistant", "going")],
        vec![("system", "Be short"), ("user", "Stop"), ("assistant", "stopped")],
    ];
    table::conversations(&folder.path("nested.parquet"), &rows);
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    let lists: Vec<String> = rows
        .iter()
        .map(|row| json!(row.iter().map(message).collect::<Vec<_>>()).to_string())
        .collect();
    folder.write(
        "a.jsonl",
        &lists.iter().map(|l| format!("{{\"messages\": {l}}}\n")).collect::<Vec<_>>().concat(),
    );
    let cells = lists.iter().map(|l| format!("\"{}\"\n", l.replace('"', "\"\"")));
    folder.write("a.csv", &format!("messages\n{}", cells.collect::<String>()));
    let expected = folder.tokens(json!({"path": "a.jsonl"}));
    assert_eq!(expected, folder.tokens(json!({"path": "nested.parquet"})));
    assert_eq!(expected, folder.tokens(json!({"path": "a.csv"})));
}

/// Cut at any place, or with any byte turned over, a Parquet file is an error or what it was.
#[test]
fn damaged_parquet_is_told_or_harmless() {
    let folder = Folder::new();
    let column: Vec<String> = (0..40).map(|i| format!("order {i} of the press")).collect();
    table::strings(&folder.path("a.parquet"), &[("text", column)], 16);
    let whole = std::fs::read(folder.path("a.parquet")).unwrap();
    let plain = Template::plain(&tokenizer());
    let load = |bytes: &[u8]| {
        std::fs::write(folder.path("b.parquet"), bytes).unwrap();
        folder.load_with(json!([{"path": "b.parquet"}]), &plain)
    };
    for cut in [1, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
        let said = load(&whole[..cut]).map(drop).unwrap_err();
        assert!(said.contains("b.parquet: not a whole Parquet file"), "{said}");
        assert!(said.contains("write or copy the file again"), "{said}");
    }
    let mut refused = 0;
    for at in (0..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        refused += usize::from(load(&bytes).is_err());
    }
    assert!(refused > 0);
}

/// Arguments as Python's `json.dumps` writes them: templates were made with it.
#[test]
fn tools_and_calls_reach_the_template() {
    let folder = Folder::new();
    let record = json!({
        "tools": [{"type": "function", "function": {"name": "stop", "parameters": {"a": [1, 2.5]}}}],
        "messages": [
            {"role": "user", "content": "Stop"},
            {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "id": "1",
                "function": {"name": "stop", "arguments": "{\"line\": 2, \"why\": \"a & b\"}"}}]},
            {"role": "tool", "content": "stopped", "tool_call_id": "1"},
            {"role": "assistant", "content": "It stopped"},
        ],
    });
    folder.write("a.jsonl", &record.to_string());
    let source = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>\
                  {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}\
                  {% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let template = Template::from_source("t", source, &tokenizer()).unwrap();
    let data = folder.load_with(json!([{"path": "a.jsonl"}]), &template).unwrap();
    let ids = data.train[0].ids();
    let text = tokenizer().decode(ids, false).unwrap();
    let expected = [
        "[{\"type\": \"function\", \"function\": {\"name\": \"stop\", \"parameters\": {\"a\": [1, 2.5]}}}]\n",
        "<user>Stop",
        "<assistant>{\"name\": \"stop\", \"arguments\": {\"line\": 2, \"why\": \"a & b\"}}",
        "<tool>stopped",
        "<assistant>It stopped",
    ];
    for part in expected {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let trained = trained(&data).remove(0);
    assert!(trained.contains("why") && trained.contains("It stopped"), "{trained}");
    assert!(!trained.contains("<tool>") && !trained.contains("Stop\n"), "{trained}");
    // A template without tools must not pass over them in silence.
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}";
    let template = Template::from_source("t", source, &tokenizer()).unwrap();
    let said = folder.load_with(json!([{"path": "a.jsonl"}]), &template).map(drop).unwrap_err();
    assert!(said.contains("a.jsonl:1: chat template t: passes over the tool calls"), "{said}");
}

/// A thought is trained with its answer, or the record is refused.
#[test]
fn reasoning_is_trained_or_refused() {
    let folder = Folder::new();
    let turn = |question: &str, thought: &str, answer: &str, weight: usize| {
        json!([{"role": "user", "content": question},
            {"role": "assistant", "weight": weight, "content": [
                {"type": "reasoning", "value": thought}, {"type": "text", "value": answer}]}])
    };
    let both = |weight| {
        let (first, second) =
            (turn("Status?", "look first", "ready", weight), turn("Go", "is it safe", "going", 1));
        let list = [first.as_array().unwrap().clone(), second.as_array().unwrap().clone()].concat();
        json!({"messages": list}).to_string()
    };
    folder
        .write("one.jsonl", &json!({"messages": turn("Go", "is it safe", "going", 1)}).to_string());
    folder.write("two.jsonl", &both(1));
    folder.write("last.jsonl", &both(0));
    // Only what was thought last is kept, as by the templates of thinking models.
    let source = "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content and loop.last %}\
                  <think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>\n\
                  {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let template = Template::from_source("t", source, &tokenizer()).unwrap();
    let load = |name: &str| folder.load_with(json!([{"path": name}]), &template);
    assert_eq!(trained(&load("one.jsonl").unwrap()), ["<think>is it safe</think>going"]);
    assert_eq!(trained(&load("last.jsonl").unwrap()), ["<think>is it safe</think>going"]);
    let said = load("two.jsonl").map(drop).unwrap_err();
    assert!(said.contains("two.jsonl:1") && said.contains("reasoning of message 1"), "{said}");
    assert!(said.contains("weight 0"), "{said}");
    let plain = folder.load(json!([{"path": "two.jsonl"}]));
    assert!(trained(&plain)[0].contains("look first\nready"), "{:?}", trained(&plain));
    // The key that servers use says the same.
    let key = json!({"messages": [{"role": "user", "content": "Go"},
        {"role": "assistant", "content": "going", "reasoning_content": "is it safe"}]});
    folder.write("key.jsonl", &key.to_string());
    assert_eq!(
        load("key.jsonl").unwrap().train[0].ids(),
        load("one.jsonl").unwrap().train[0].ids()
    );
}
