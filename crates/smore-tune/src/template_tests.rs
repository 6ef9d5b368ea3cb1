use std::fs;

use super::*;
use crate::tokenizer::tests::byte_level;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content|trim + \
                      '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
                      '<|im_start|>assistant\n' }}{% endif %}";

fn tokenizer() -> Tokenizer {
    let mut inner = byte_level();
    inner.add_special_tokens(
        &["<|im_start|>", "<|im_end|>", "<|end|>", "<|system|>"]
            .map(|t| tokenizers::AddedToken::from(t, true)),
    );
    Tokenizer::from_parts(inner, Some("<s>"), Some("</s>")).unwrap()
}

fn template(source: &str) -> Template {
    Template::from_source("test", source, &tokenizer()).unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message::new(*role, *content)).collect()
}

/// The trained pieces of a conversation, checked to be pieces of the rendered text.
fn trained(template: &Template, turns: &[(&str, &str)]) -> Vec<String> {
    let messages = chat(turns);
    let (text, ranges) = template.render_training(&messages).unwrap();
    assert_eq!(text, template.render(&messages, false).unwrap());
    ranges.into_iter().map(|range| text[range].to_owned()).collect()
}

fn refusal(template: &Template, turns: &[(&str, &str)]) -> String {
    let error = template.render_training(&chat(turns)).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn the_plain_form() {
    let plain = Template::plain(&tokenizer());
    let turns = [("system", "S"), ("user", "Q"), ("assistant", "A")];
    assert_eq!(plain.render(&chat(&turns), false).unwrap(), "S\nQ\nA</s>");
    assert_eq!(plain.render(&chat(&turns[..2]), true).unwrap(), "S\nQ\n");
    assert_eq!(trained(&plain, &turns), ["A</s>"]);
    let turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")];
    assert_eq!(plain.render(&chat(&turns), false).unwrap(), "Q\nA</s>\nR\nB</s>");
    assert_eq!(trained(&plain, &turns), ["A</s>", "B</s>"]);
}

#[test]
fn an_answer_and_its_end_of_turn_are_trained_and_nothing_else() {
    let turns = [("user", "Q"), ("assistant", " A\n"), ("user", "A"), ("assistant", "")];
    assert_eq!(trained(&template(CHATML), &turns), ["A<|im_end|>", "<|im_end|>"]);
}

#[test]
fn what_follows_the_end_of_turn_is_not_trained() {
    // In the way of Phi-3.5: EOS behind the conversation if no answer is to follow.
    let source = "{% for m in messages %}<|system|>{{ m.role }}|{{ m.content }}<|end|>\n{% endfor %}\
                  {% if add_generation_prompt %}<|system|>assistant|{% else %}{{ eos_token }}{% endif %}";
    let turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")];
    assert_eq!(trained(&template(source), &turns), ["A<|end|>", "B<|end|>"]);
    // No end of turn at all: the header of the next turn is not one.
    let source = "{% for m in messages %}<|system|>{{ m.role }}|{{ m.content }}{% endfor %}\
                  {% if add_generation_prompt %}<|system|>assistant|{% endif %}";
    assert_eq!(trained(&template(source), &turns), ["A", "B"]);
}

#[test]
fn a_thought_that_the_template_puts_in_front_is_trained_where_the_prompt_leaves_it_out() {
    // In the way of Qwen 3: only the last answer keeps its thought.
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n\
                  {% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>\n\
                  {% else %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")];
    assert_eq!(
        trained(&template(source), &turns),
        ["A<|im_end|>", "<think>\n\n</think>\n\nB<|im_end|>"]
    );
    // In the way of DeepSeek R1: the prompt opens a thought that training texts do not have.
    let source = CHATML
        .replace("assistant\\n' }}", "assistant\\n<think>' }}")
        .replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'");
    assert_eq!(trained(&template(&source), &turns), ["A<|im_end|>", "B<|im_end|>"]);
}

#[test]
fn generation_marks_decide() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}[A]\n\
                  {% generation %}\n{{ m.content }}!{% endgeneration %}\n\
                  {%- else %}[U]{{ m.content }}{% endif %}{% endfor %}";
    let template = template(source);
    let turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")];
    assert_eq!(template.render(&chat(&turns), false).unwrap(), "[U]Q[A]\nA![U]R[A]\nB!");
    assert_eq!(trained(&template, &turns), ["A!", "B!"]);
}

#[test]
fn refusals_name_the_remedy() {
    let chatml = template(CHATML);
    assert!(refusal(&chatml, &[("user", "Q")]).contains("no assistant message"));
    assert!(refusal(&chatml, &[("user", "\u{FDD0}"), ("assistant", "A")]).contains("U+FDD0"));
    let doubling = template("{% for m in messages %}{{ m.content + m.content }}{% endfor %}");
    assert!(refusal(&doubling, &[("user", "Q"), ("assistant", "A")]).contains("{% generation %}"));
    let endless =
        template("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}");
    assert!(refusal(&endless, &[("user", "Q"), ("assistant", "A")]).contains("fuel"));
    let raising = template("{{ raise_exception('System role not supported') }}");
    let text = refusal(&raising, &[("user", "Q"), ("assistant", "A")]);
    assert_eq!(text, "chat template test: refused the conversation: System role not supported");
    let error = Template::from_source("bad", "{% for %}", &tokenizer()).unwrap_err();
    assert!(matches!(error, Error::Template { name, .. } if name == "bad"));
}

#[test]
fn messages_behind_the_last_answer_are_left_out() {
    let turns = [("user", "Q"), ("assistant", "A"), ("user", "R")];
    let (text, _) = template(CHATML).render_training(&chat(&turns)).unwrap();
    assert_eq!(text, template(CHATML).render(&chat(&turns[..2]), false).unwrap());
}

#[test]
fn prompts_are_encoded_as_in_training() {
    let notes = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    let dir = tempfile::tempdir().unwrap();
    byte_level().save(dir.path().join("tokenizer.json"), false).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), notes.to_string()).unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    let bos = tokenizer.bos_id().unwrap();
    let messages = chat(&[("user", "Q")]);
    let plain = Template::open(dir.path(), &tokenizer).unwrap();
    assert!(plain.is_plain());
    assert_eq!(plain.encode_prompt(&tokenizer, &messages).unwrap()[0], bos);
    let writes_bos =
        Template::from_source("t", "{{ bos_token }}{{ messages[0].content }}", &tokenizer).unwrap();
    let ids = writes_bos.encode_prompt(&tokenizer, &messages).unwrap();
    assert_eq!((ids.len(), ids[0]), (2, bos));
}

#[test]
fn the_template_is_found_where_models_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("tokenizer_config.json");
    let rendered =
        || Template::open(dir.path(), &tokenizer())?.render(&chat(&[("user", "Q")]), false);
    assert_eq!(rendered().unwrap(), "Q\n");
    fs::write(&config, r#"{"chat_template": "one"}"#).unwrap();
    assert_eq!(rendered().unwrap(), "one");
    let list = r#"{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]}"#;
    fs::write(&config, list).unwrap();
    assert_eq!(rendered().unwrap(), "two");
    fs::write(&config, r#"{"chat_template": [{"name": "rag", "template": "no"}]}"#).unwrap();
    assert!(rendered().unwrap_err().to_string().contains("chat_template.jinja"));
    fs::write(dir.path().join("chat_template.jinja"), "three").unwrap();
    assert_eq!(rendered().unwrap(), "three");
}
