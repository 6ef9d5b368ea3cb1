//! Families of tasks put together from the demo's skills.
//!
//! `pairs` and `branch` hold some combinations of skills out of training altogether: whether an
//! adapter answers those tells whether it learned the parts or the wholes.

use crate::demo::skills::{self, Example, Skill};
use serde::{Deserialize, Serialize};
use serde_json::json;
use smore::rng::{Purpose, stream};

use rand::RngExt;

/// A family of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// The six skills side by side, one a question.
    Desk,
    /// Two skills in one question, both to be answered in turn.
    Pairs,
    /// A reading decides which of two further questions is to be answered.
    Branch,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 3] = [Self::Desk, Self::Pairs, Self::Branch];

    /// Short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Desk => "desk",
            Self::Pairs => "pairs",
            Self::Branch => "branch",
        }
    }

    /// One line for people.
    pub fn description(self) -> &'static str {
        match self {
            Self::Desk => "six skills side by side",
            Self::Pairs => "two skills in one question",
            Self::Branch => "a reading decides which of two questions counts",
        }
    }
}

/// Combinations that training has.
pub(super) const SEEN: &str = "seen";
/// Combinations that training has not.
pub(super) const NEW: &str = "new combinations";

/// A question with the one right answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// [`SEEN`] or [`NEW`].
    pub(super) kind: &'static str,
    pub(super) prompt: String,
    pub(super) completion: String,
}

/// Training and held-out questions; the same ones for the same arguments. No fact that decides a
/// held-out answer is in training, and half of the held-out combinations are not either.
pub(super) fn questions(
    family: Family,
    seed: u64,
    train: usize,
    held_out: usize,
) -> (Vec<Question>, Vec<Question>) {
    // Three skills in a question at most, and room for one skill to be drawn more often.
    let (facts, other_facts) = skills::dataset(seed, 4 * train + 600, 4 * held_out + 600);
    let make = |facts: &[Example], n: usize, place: u64, may_be_new: bool| -> Vec<Question> {
        let mut drawer = Drawer::new(facts, seed, family as u64 * 2 + place);
        let new = |i: usize| may_be_new && i % 2 == 1;
        (0..n).map(|i| drawer.question(family, i, new(i))).collect()
    };
    let may_be_new = family != Family::Desk;
    (make(&facts, train, 0, false), make(&other_facts, held_out, 1, may_be_new))
}

/// As lines of JSON that `smore train` reads.
pub(super) fn to_jsonl(questions: &[Question]) -> String {
    let line = |q: &Question| json!({"prompt": q.prompt, "completion": q.completion}).to_string();
    questions.iter().map(|q| line(q) + "\n").collect()
}

/// Deals examples of every skill in turn.
struct Drawer<'a> {
    by_skill: Vec<Vec<&'a Example>>,
    next: Vec<usize>,
    rng: rand_chacha::ChaCha8Rng,
}

impl<'a> Drawer<'a> {
    fn new(facts: &'a [Example], seed: u64, place: u64) -> Self {
        let of = |skill: &Skill| facts.iter().filter(|e| e.skill == *skill).collect();
        Self {
            by_skill: Skill::ALL.iter().map(of).collect(),
            next: vec![0; Skill::ALL.len()],
            rng: stream(seed, Purpose::Tasks, 0, place),
        }
    }

    fn deal(&mut self, skill: usize) -> &'a Example {
        let dealt = self.next[skill];
        self.next[skill] += 1;
        self.by_skill[skill][dealt % self.by_skill[skill].len()]
    }

    fn question(&mut self, family: Family, i: usize, new: bool) -> Question {
        let kind = if new { NEW } else { SEEN };
        match family {
            Family::Desk => {
                let e = self.deal(i % Skill::ALL.len());
                Question { kind, prompt: e.prompt.clone(), completion: e.completion.clone() }
            }
            Family::Pairs => {
                let (a, b) = self.pair(Skill::ALL.len(), new);
                let (a, b) = (self.deal(a), self.deal(b));
                Question {
                    kind,
                    prompt: format!("{} And: {} Both:", a.prompt, b.prompt),
                    completion: format!("{},{}", a.completion, b.completion),
                }
            }
            Family::Branch => self.branch(kind, new),
        }
    }

    fn branch(&mut self, kind: &'static str, new: bool) -> Question {
        const LIMIT: usize = Skill::Limit as usize;
        let others: Vec<usize> = (0..Skill::ALL.len()).filter(|&s| s != LIMIT).collect();
        let (a, b) = self.pair(others.len(), new);
        let stops = self.rng.random_bool(0.5);
        let limit = loop {
            let e = self.deal(LIMIT);
            if (e.completion == " STOP") == stops {
                break e;
            }
        };
        let (a, b) = (self.deal(others[a]), self.deal(others[b]));
        Question {
            kind,
            prompt: format!("{} STOP: {} Else: {} So:", limit.prompt, a.prompt, b.prompt),
            completion: if stops { a } else { b }.completion.clone(),
        }
    }

    /// Two different numbers below `n`, of those that training has or of the others.
    fn pair(&mut self, n: usize, new: bool) -> (usize, usize) {
        loop {
            let (a, b) = (self.rng.random_range(0..n), self.rng.random_range(0..n));
            if a != b && held_back(a, b) == new {
                return (a, b);
            }
        }
    }
}

/// Whether training never has this pair. Every number still is first and second in pairs that it
/// has.
fn held_back(a: usize, b: usize) -> bool {
    (a + 2 * b).is_multiple_of(5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_part_is_trained_in_every_place_but_some_pairs_never() {
        for n in [5, 6] {
            let pairs = || (0..n).flat_map(|a| (0..n).map(move |b| (a, b)));
            let different = || pairs().filter(|(a, b)| a != b);
            let new = different().filter(|&(a, b)| held_back(a, b)).count();
            assert!(new >= 4 && new * 3 < different().count(), "{n}: {new}");
            for part in 0..n {
                assert!(different().any(|(a, b)| a == part && !held_back(a, b)));
                assert!(different().any(|(a, b)| b == part && !held_back(a, b)));
            }
        }
    }

    #[test]
    fn the_same_arguments_give_the_same_questions_and_no_prompt_is_in_both_parts() {
        for family in Family::ALL {
            let (train, held_out) = questions(family, 3, 300, 60);
            assert_eq!((train.clone(), held_out.clone()), questions(family, 3, 300, 60));
            assert_ne!(train, questions(family, 4, 300, 60).0);
            let seen: BTreeSet<&str> = train.iter().map(|q| q.prompt.as_str()).collect();
            assert!(held_out.iter().all(|q| !seen.contains(q.prompt.as_str())));
            assert!(train.iter().all(|q| q.kind == SEEN && q.completion.starts_with(' ')));
            let new = held_out.iter().filter(|q| q.kind == NEW).count();
            assert_eq!(new, if family == Family::Desk { 0 } else { 30 });
        }
    }

    #[test]
    fn a_reading_decides_the_branch() {
        let facts = skills::dataset(7, 4 * 200 + 600, 0).0;
        let answer = |prompt: &str| {
            let example = facts.iter().find(|e| e.prompt == prompt).unwrap();
            example.completion.as_str()
        };
        let mut stops = 0;
        for q in questions(Family::Branch, 7, 200, 0).0 {
            let (reading, rest) = q.prompt.split_once(" STOP: ").unwrap();
            let (first, second) = rest.strip_suffix(" So:").unwrap().split_once(" Else: ").unwrap();
            let stop = answer(reading) == " STOP";
            stops += usize::from(stop);
            assert_eq!(q.completion, answer(if stop { first } else { second }));
        }
        assert!((70..=130).contains(&stops), "{stops}");
    }
}
