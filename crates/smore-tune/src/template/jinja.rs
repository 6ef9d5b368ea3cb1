//! Jinja as chat templates expect it: the settings and functions of Hugging Face's renderer.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::{TRAINED_END, TRAINED_START};

/// Starts the detail of an error that a template raised itself.
pub(super) const RAISED: &str = "raised by the template: ";

/// The filter that stands for `{% generation %}`.
const GENERATION: &str = "smore_generation";

/// Instructions that rendering a conversation may take: thousands of messages.
const FUEL: u64 = 50_000_000;

/// An environment with everything chat templates use.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    // The builder only checks delimiters, and these are the default ones.
    environment.set_syntax(syntax.build().unwrap_or_default());
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    // A template comes with a model and may be anyone's: one that loops for ever must end.
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment
        .add_filter(GENERATION, |text: String| format!("{TRAINED_START}{text}{TRAINED_END}"));
    environment
}

/// A JSON value for a template.
pub(super) fn value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(on) => Value::from(*on),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (_, Some(whole)) => Value::from(whole),
            _ => Value::from(number.as_f64()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(list) => list.iter().map(value).collect(),
        Json::Object(object) => {
            Value::from_pairs(object.iter().map(|(key, json)| (key.as_str(), value(json))))
        }
    }
}

/// Rewrites `{% generation %}` blocks, which Jinja does not know, to a filter that marks their
/// text; whitespace control stays as written. Also tells whether there was one.
pub(super) fn generation_as_filter(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let Some(close) = rest.find("%}") else { break };
        let (tag, after) = rest.split_at(close + 2);
        let inner = &tag[2..close.max(2)];
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => {
                found = true;
                out.push_str(&tag.replace("generation", &format!("filter {GENERATION}")));
            }
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endfilter")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

fn raise_exception(message: &str) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

/// The date of every prompt, so that a prompt is the same on any day: the one that Llama's
/// templates fall back to, 26 July 2024, a Friday, at midnight.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out.push_str(match chars.next() {
            Some('d' | 'e') => "26",
            Some('m') => "07",
            Some('b' | 'h') => "Jul",
            Some('B') => "July",
            Some('Y') => "2024",
            Some('y') => "24",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('H' | 'M' | 'S') => "00",
            Some('I') => "12",
            Some('p') => "AM",
            Some('j') => "208",
            Some('F') => "2024-07-26",
            Some('T') => "00:00:00",
            Some('%') => "%",
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now does not know %{code}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(out)
}

/// JSON as Python writes it. The built-in filter also escapes what HTML needs; that is undone.
#[allow(clippy::needless_pass_by_value, reason = "the form that Jinja takes filters in")]
fn tojson(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    // Hugging Face's own filter takes `ensure_ascii` too and leaves it off by default.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get("indent")?,
    };
    kwargs.assert_all_used()?;
    let html = minijinja::filters::tojson(value, indent, Kwargs::from_iter(NO_KWARGS))?;
    Ok(Value::from(unescape_html(html.as_str().unwrap_or_default())))
}

const NO_KWARGS: [(&str, Value); 0] = [];

fn unescape_html(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let escapes = [("\\u003c", '<'), ("\\u003e", '>'), ("\\u0026", '&'), ("\\u0027", '\'')];
        if let Some((escape, c)) = escapes.into_iter().find(|(escape, _)| rest.starts_with(escape))
        {
            out.push(c);
            rest = &rest[escape.len()..];
        } else {
            // The escaped character goes along, so that `\\u003c` is not taken for an escape.
            let len = 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            out.push_str(&rest[..len]);
            rest = &rest[len..];
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_keep_their_whitespace_control() {
        let (source, found) =
            generation_as_filter("a {%- generation %}b{%endgeneration-%} c {% if x %}");
        assert!(found);
        assert_eq!(source, "a {%- filter smore_generation %}b{%endfilter-%} c {% if x %}");
        assert!(!generation_as_filter("{% if add_generation_prompt %}").1);
        assert_eq!(generation_as_filter("text {% unclosed").0, "text {% unclosed");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let mut environment = environment();
        environment.add_template("t", "{{ x|tojson }}").unwrap();
        let text = environment
            .get_template("t")
            .unwrap()
            .render(minijinja::context! { x => vec!["<a> & 'b'", "\\u003c", "é"] })
            .unwrap();
        assert_eq!(text, r#"["<a> & 'b'", "\\u003c", "é"]"#);
    }

    #[test]
    fn the_date_never_changes() {
        assert_eq!(strftime_now("%d %b %Y").unwrap(), "26 Jul 2024");
        assert!(strftime_now("%Q").unwrap_err().to_string().contains("%Q"));
    }
}
