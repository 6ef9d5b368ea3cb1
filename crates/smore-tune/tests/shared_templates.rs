//! Chat templates of public models against what the reference renderer makes of them. The material
//! lies outside the repository, in the folder that `SMORE_SHARED` names or beside the checkout;
//! without it there is nothing to check.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use smore_tune::template::{Message, Template};
use smore_tune::tokenizer::Tokenizer;
use tokenizers::AddedToken;
use tokenizers::models::wordlevel::WordLevel;

fn templates() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let folder = std::env::var_os("SMORE_SHARED").map_or_else(beside, PathBuf::from);
    let folder = folder.join("data/templates");
    folder.is_dir().then_some(folder)
}

/// A tokenizer that knows nothing but special tokens.
fn tokenizer(bos: &str, eos: &str) -> Tokenizer {
    let mut inner = tokenizers::Tokenizer::new(WordLevel::default());
    let end_of_turn = ["<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>"];
    let tokens: BTreeSet<&str> = end_of_turn.into_iter().chain([bos, eos]).collect();
    let tokens: Vec<_> = tokens.into_iter().map(|token| AddedToken::from(token, true)).collect();
    inner.add_special_tokens(&tokens);
    let named = |token: &'static str| (!token.is_empty()).then_some(token);
    Tokenizer::from_parts(inner, named(leak(bos)), named(leak(eos))).unwrap()
}

fn leak(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

fn cases(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("rendered.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(!cases.is_empty());
    cases
}

fn template(folder: &Path, case: &Value) -> Template {
    let name = case["template"].as_str().unwrap();
    let source = fs::read_to_string(folder.join(name)).unwrap();
    let tokenizer =
        tokenizer(case["bos_token"].as_str().unwrap(), case["eos_token"].as_str().unwrap());
    Template::from_source(name, &source, &tokenizer).unwrap()
}

fn messages(case: &Value) -> Vec<Message> {
    let messages = case["messages"].as_array().unwrap().iter();
    messages
        .map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
        .collect()
}

#[test]
fn renderings_equal_the_reference() {
    let Some(folder) = templates() else { return };
    for case in cases(&folder) {
        let label = format!("{} {}", case["template"], case["case"]);
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let rendered = template(&folder, &case).render(&messages(&case), add_generation_prompt);
        if let Some(expected) = case["rendered"].as_str() {
            assert_eq!(rendered.unwrap(), expected, "{label}");
        } else {
            let message = rendered.unwrap_err().to_string();
            let expected = case["error"].as_str().unwrap();
            assert!(message.contains(expected), "{label}: {message}");
        }
    }
}

#[test]
fn answers_are_found_in_every_rendering() {
    let Some(folder) = templates() else { return };
    let (mut n_checked, mut n_refused) = (0, 0);
    for case in cases(&folder) {
        let (messages, label) = (messages(&case), format!("{} {}", case["template"], case["case"]));
        let answers: Vec<&str> =
            messages.iter().filter(|m| m.is_answer()).map(|m| m.content.as_str()).collect();
        if answers.is_empty() || case["rendered"].is_null() {
            continue;
        }
        let rendered = template(&folder, &case).render_training(&messages);
        // This template writes the system message in front of a last user message alone: behind an
        // answer it would be lost without a word.
        let drops_system = case["template"].as_str().unwrap().contains("Mistral-Nemo")
            && messages.iter().any(|m| m.role == "system");
        if drops_system {
            let message = rendered.unwrap_err().to_string();
            assert!(message.contains("passes over message 0"), "{label}: {message}");
            n_refused += 1;
            continue;
        }
        let (text, ranges) = rendered.unwrap();
        assert_eq!(ranges.len(), answers.len(), "{label}");
        for (range, answer) in ranges.into_iter().zip(answers) {
            let trained = &text[range];
            // Qwen 3 writes the empty thought of the last answer itself.
            let trained = trained.strip_prefix("<think>\n\n</think>\n\n").unwrap_or(trained);
            let end_of_turn =
                trained.strip_prefix(answer).unwrap_or_else(|| panic!("{label}: {trained}"));
            let is_token = end_of_turn.starts_with('<') && end_of_turn.ends_with('>');
            assert!(is_token && end_of_turn.matches('<').count() == 1, "{label}: {trained}");
        }
        n_checked += 1;
    }
    assert!(n_checked > 30 && n_refused > 0, "{n_checked}, {n_refused}");
}
