use super::*;

/// The demo's base, which a test may spoil.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../smore-cli/assets/demo-base");
    for entry in std::fs::read_dir(base).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let line = "{\"instruction\": \"Order of the press\", \"output\": \"order\"}\n";
    std::fs::write(dir.path().join("data.jsonl"), line.repeat(20)).unwrap();
    dir
}

fn subject(dir: &Path) -> Subject {
    let text = format!(
        "model: {0}\nadapter: {{kind: smore, layers: [{{experts: 4, fanout: 2, rank: 2}}]}}\n\
         data: {{train: [{{path: {0}/data.jsonl}}], cutoff_len: 64}}\noutput_dir: {0}/run\n",
        dir.display()
    );
    Subject::from(&RunConfig::parse(&text, "run.yaml").unwrap())
}

/// Changes a JSON file of the folder.
fn edit(dir: &Path, name: &str, change: impl Fn(&mut serde_json::Value)) {
    let file = dir.join(name);
    let text = std::fs::read_to_string(&file).unwrap_or_else(|_| "{}".into());
    let mut json = serde_json::from_str(&text).unwrap();
    change(&mut json);
    std::fs::write(file, json.to_string()).unwrap();
}

/// Areas, messages and remedies of what is as bad as `severity`.
fn found(examined: &Examined, severity: Severity) -> Vec<(Area, String)> {
    let findings = examined.findings.iter().filter(|f| f.severity == severity);
    let said = |f: &Finding| format!("{} | {}", f.message, f.remedy.as_deref().unwrap_or("-"));
    findings.map(|f| (f.area, said(f))).collect()
}

#[test]
fn a_good_run_has_something_good_to_say_of_everything() {
    let dir = folder();
    let mut examined = examine(&subject(dir.path()));
    assert_eq!(found(&examined, Severity::Error), []);
    for area in [Area::Model, Area::Tokenizer, Area::Template, Area::Adapter, Area::Data] {
        assert!(examined.findings.iter().any(|f| f.area == area), "{area}");
    }
    let machine = examined.findings.iter().filter(|f| f.area == Area::Machine);
    assert!(machine.count() >= 3, "processor, memory and disk");
    assert!(examined.accept().is_ok());
    assert!(examined.findings.iter().all(|f| f.remedy.is_some() != (f.severity == Severity::Good)));
}

/// It does not stop at the first.
#[test]
fn everything_wrong_is_found_in_one_go() {
    let dir = folder();
    let path = dir.path();
    edit(path, "tokenizer_config.json", |json| json["chat_template"] = "{% for %}".into());
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    let mut subject = subject(path);
    let data = subject.data.as_mut().unwrap();
    data.train[0].path = path.join("none.jsonl");
    let Some(AdapterConfig::Smore(smore)) = &mut subject.adapter else { panic!() };
    smore.layers[0].fanout = 5;
    let mut examined = examine(&subject);
    let errors = found(&examined, Severity::Error);
    let areas: Vec<Area> = errors.iter().map(|(area, _)| *area).collect();
    assert_eq!(areas, [Area::Data, Area::Template, Area::Model, Area::Adapter], "{errors:?}");
    assert!(errors[0].1.contains("none.jsonl"), "{errors:?}");
    assert!(errors[2].1.contains("model.safetensors"), "{errors:?}");
    assert!(errors[3].1.contains("fanout is 5"), "{errors:?}");
    // A run is refused with the first.
    assert!(examined.accept().unwrap_err().to_string().contains("none.jsonl"));
}

#[test]
fn a_tokenizer_without_an_end_token() {
    let dir = folder();
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        edit(dir.path(), name, |json| json["eos_token"] = serde_json::Value::Null);
    }
    for name in ["generation_config.json", "config.json"] {
        edit(dir.path(), name, |json| json["eos_token_id"] = serde_json::Value::Null);
    }
    let errors = found(&examine(&subject(dir.path())), Severity::Error);
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].0, Area::Tokenizer);
    let (message, remedy) = errors[0].1.split_once(" | ").unwrap();
    assert!(message.contains("names no end token"), "{message}");
    assert!(remedy.contains("`eos_token`"), "{remedy}");
}

/// Templates that would train the wrong thing silently.
#[test]
fn templates_that_double_bos_or_never_end() {
    let turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}";
    let cases = [
        (
            format!(
                "{{{{ bos_token }}}}{{{{ bos_token }}}}{turns}{{{{ eos_token }}}}{{% endfor %}}"
            ),
            Severity::Error,
            "twice at the start",
        ),
        (format!("{turns}\n{{% endfor %}}"), Severity::Error, "never learn to stop"),
        (
            format!("{turns}{{{{ bos_token }}}}{{% endfor %}}"),
            Severity::Warning,
            "at which generation does not stop",
        ),
        (
            format!("{turns}{{{{ eos_token }}}}{{% endfor %}}"),
            Severity::Good,
            "its end token is trained",
        ),
    ];
    for (template, severity, expected) in cases {
        let dir = folder();
        std::fs::write(dir.path().join("chat_template.jinja"), &template).unwrap();
        let examined = examine(&subject(dir.path()));
        let said = found(&examined, severity);
        let found =
            said.iter().any(|(area, said)| *area == Area::Template && said.contains(expected));
        assert!(found, "{template}: {:?}", examined.findings);
        assert_eq!(examined.count(Severity::Error), usize::from(severity == Severity::Error));
    }
}

#[test]
fn broken_json_is_said_once() {
    let dir = folder();
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    let errors = found(&examine(&subject(dir.path())), Severity::Error);
    assert!(!errors.is_empty() && errors[0].1.contains("config.json"), "{errors:?}");
    let mut said: Vec<&String> = errors.iter().map(|(_, said)| said).collect();
    said.dedup();
    assert_eq!(said.len(), errors.len());
}

/// Without a run: model, adapter and data by themselves.
#[test]
fn parts_can_be_looked_at_alone() {
    let dir = folder();
    let bare =
        Subject { adapter: None, data: None, train: None, output_dir: None, ..subject(dir.path()) };
    let examined = examine(&bare);
    assert_eq!(examined.count(Severity::Error), 0, "{:?}", examined.findings);
    assert!(!examined.findings.iter().any(|f| matches!(f.area, Area::Adapter | Area::Data)));
    let path = dir.path().join("no-adapter");
    let adapter = Some(AdapterConfig::Saved(crate::config::SavedConfig { path }));
    let errors = found(&examine(&Subject { adapter, ..bare }), Severity::Error);
    assert!(errors.len() == 1 && errors[0].1.contains("adapter_config.json"), "{errors:?}");
}

/// A configuration whose values are wrong is looked at all the same.
#[test]
fn wrong_values_do_not_hide_the_rest() {
    let dir = folder();
    let file = dir.path().join("run.yaml");
    let text = "model: nowhere\nadapter: {kind: lora, rank: 4}\ndata: {train: [{path: none.jsonl}]}\n\
                train: {learning_rate: -1}\noutput_dir: run\n";
    std::fs::write(&file, text).unwrap();
    let mut examined = examine_file(&file).unwrap();
    let errors = found(&examined, Severity::Error);
    assert!(errors[0].1.contains("train.learning_rate is -1"), "{errors:?}");
    assert!(errors.iter().any(|(area, _)| *area == Area::Data), "{errors:?}");
    assert!(errors.iter().any(|(area, _)| *area == Area::Model), "{errors:?}");
    assert!(examined.accept().unwrap_err().to_string().contains("learning_rate"));
    std::fs::write(&file, "model: [").unwrap();
    assert!(examine_file(&file).is_err());
}
