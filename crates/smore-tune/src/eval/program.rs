//! HumanEval's problems: a function to finish, and the tests that it must pass.

use super::read::{Record, data_error, read};
use crate::error::Result;
use std::path::Path;

/// A function to finish.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// Its name in the set.
    pub task_id: String,
    /// The code that is to be continued.
    pub prompt: String,
    /// The function's name.
    pub entry_point: String,
    /// Code with a function `check(candidate)`.
    pub test: String,
    /// The set's own solution, where it has one.
    pub canonical_solution: Option<String>,
}

/// All problems of a file.
///
/// # Errors
/// If a record is not one of HumanEval's.
pub fn programs(file: &Path) -> Result<Vec<Program>> {
    read(file)?.iter().map(|record| Program::read(file, record)).collect()
}

/// What ends a function that a base model goes on after.
const ENDS: [&str; 6] = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"];

impl Program {
    pub(super) fn read(file: &Path, record: &Record) -> Result<Self> {
        let text = |key: &str| {
            record.value[key].as_str().map(String::from).ok_or_else(|| {
                data_error(file, record.line, format!("field `{key}` is missing or no text"))
            })
        };
        Ok(Self {
            task_id: text("task_id")?,
            prompt: text("prompt")?,
            entry_point: text("entry_point")?,
            test: text("test")?,
            canonical_solution: record.value["canonical_solution"].as_str().map(String::from),
        })
    }

    /// The whole program: the prompt's code with what the model wrote, and the tests.
    pub fn source(&self, written: &str) -> String {
        let code = if let Some((_, block)) = written.split_once("```") {
            // An answer in a block of code, as chat models write it.
            let block = block.split("```").next().unwrap_or_default();
            let first = block.lines().next().unwrap_or_default();
            if first.trim().chars().all(char::is_alphanumeric) && !first.starts_with(' ') {
                block.split_once('\n').map_or("", |(_, rest)| rest)
            } else {
                block
            }
        } else {
            let end = ENDS.iter().filter_map(|e| written.find(e)).min();
            &written[..end.unwrap_or(written.len())]
        };
        // A function written anew replaces the one begun; its imports stay.
        format!("{}{code}\n{}\ncheck({})\n", self.prompt, self.test, self.entry_point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> Program {
        Program {
            task_id: "x/0".into(),
            prompt: "def one():\n    \"\"\"One.\"\"\"\n".into(),
            entry_point: "one".into(),
            test: "def check(f):\n    assert f() == 1\n".into(),
            canonical_solution: None,
        }
    }

    #[test]
    fn code_ends_with_the_function_or_its_block() {
        let p = program();
        let tail = format!("\n{}\ncheck(one)\n", p.test);
        let want = |code: &str| format!("{}{code}{tail}", p.prompt);
        assert_eq!(p.source("    return 1\n\ndef two():\n"), want("    return 1\n"));
        let block = "Here:\n```python\ndef one():\n    return 1\n```\nDone";
        assert_eq!(p.source(block), want("def one():\n    return 1\n"));
        assert_eq!(p.source("```\nx = 1\n```"), want("x = 1\n"));
    }
}
