//! Answers out of generated text.

use fancy_regex::Regex;
use std::sync::LazyLock;

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("is constant")
}

static STRICT: LazyLock<Regex> = LazyLock::new(|| regex(r"#### (-?[0-9.,]+)"));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| regex(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
static SAYS: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?i:answer|option|choice)\s*(?i:is|:)?\s*:?\s*\(?([A-Z])\b"));

/// GSM8K's answer as lm-evaluation-harness's `strict-match` finds it: the number after the first
/// `#### `.
pub fn strict(text: &str) -> Option<String> {
    let found = STRICT.captures(text).ok()??;
    Some(number(found.get(1)?.as_str()))
}

/// As its `flexible-extract` finds it: the last number of the text. Points and signs without a
/// digit, which the harness takes for one, are passed over.
pub fn flexible(text: &str) -> Option<String> {
    let found = FLEXIBLE.find_iter(text).filter_map(Result::ok);
    let last = found.filter(|m| m.as_str().contains(|c: char| c.is_ascii_digit())).last()?;
    Some(number(last.as_str().trim()))
}

/// A number as it is compared: without thousands' commas, dollar signs and a full stop at the end.
pub fn number(text: &str) -> String {
    let text: String = text.chars().filter(|c| !matches!(c, ',' | '$')).collect();
    text.strip_suffix('.').unwrap_or(&text).to_owned()
}

/// The letter of one of `n` choices that an answer begins with, or says to be the answer, or has
/// alone in brackets. An article at the start of a sentence is no answer.
pub fn letter(text: &str, n: usize) -> Option<usize> {
    let text = text.trim();
    let place = |c: char| (c as usize).checked_sub('A' as usize).filter(|&i| i < n);
    let start = text.trim_start_matches(['(', '[', '*', '"', '\'']);
    let mut chars = start.chars();
    if let Some(i) = chars.next().and_then(place) {
        let mut rest = chars.clone();
        let (next, after) = (rest.next(), rest.next());
        let word = next.is_some_and(|c| c.is_alphanumeric() || c == '\'');
        let article = next == Some(' ') && after.is_some_and(char::is_lowercase);
        if !word && !article {
            return Some(i);
        }
    }
    let said = SAYS.captures_iter(text).filter_map(Result::ok).filter_map(|c| c.get(1));
    if let Some(i) = said.filter_map(|m| place(m.as_str().chars().next()?)).last() {
        return Some(i);
    }
    let mut bracketed: Vec<usize> =
        (0..n).filter(|&i| text.contains(&format!("({})", letter_of(i)))).collect();
    if bracketed.len() == 1 { bracketed.pop() } else { None }
}

/// A, B, C, ...
pub fn letter_of(place: usize) -> char {
    char::from(b'A' + place as u8)
}

#[cfg(test)]
mod tests;
