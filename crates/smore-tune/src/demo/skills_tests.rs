use super::super::corpus::corpus;
use super::super::tokenizer::train_tokenizer;
use super::*;
use crate::demo::VOCAB_SIZE;
use crate::demo::facts::{GAUGES, MONTHS};

const SEED: u64 = 11;

/// Words and numbers of a text.
fn words(text: &str) -> Vec<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect()
}

/// The word or number right after `name`.
fn after<'a>(words: &[&'a str], name: &str) -> &'a str {
    let at = words.iter().position(|w| *w == name);
    words[at.unwrap_or_else(|| panic!("no {name} in {words:?}")) + 1]
}

/// The fault that a complaint is about: its part is named and not called fine.
fn broken(prompt: &str) -> &'static Fault {
    let words = words(prompt);
    let found: Vec<_> = FAULTS
        .iter()
        .filter(|f| words.contains(&f.part) && words.contains(&f.state))
        .filter(|f| !prompt.contains(&format!("the {} is fine", f.part)))
        .collect();
    assert_eq!(found.len(), 1, "{prompt}");
    found[0]
}

fn fault_of_code(words: &[&str]) -> &'static Fault {
    FAULTS.iter().find(|f| words.contains(&f.code)).unwrap()
}

/// The answer worked out from the prompt alone.
fn solve(example: &Example) -> String {
    let prompt = example.prompt.as_str();
    let words = words(prompt);
    match example.skill {
        Skill::Route => broken(prompt).crew.name().to_owned(),
        Skill::Remedy => {
            let fault = fault_of_code(&words);
            format!("{} {}", fault.verb, fault.part)
        }
        Skill::Extract => after(&words, words[words.len() - 1]).to_owned(),
        Skill::Date => {
            let n = words.len();
            let month: usize = words[n - 3].parse().unwrap();
            format!("{} {}", words[n - 2].trim_start_matches('0'), MONTHS[month - 1])
        }
        Skill::Limit => {
            let number = |name: &str| after(&words, name).parse::<i32>().unwrap();
            let gauge = words.iter().find(|w| GAUGES.contains(w)).unwrap();
            let value = number(gauge);
            match (value < number("warn"), value < number("stop")) {
                (true, true) => "OK",
                (false, true) => "WARN",
                _ => "STOP",
            }
            .to_owned()
        }
        Skill::Plan => {
            let before = |p: &str| words[words.iter().position(|w| *w == p).unwrap() - 1];
            [before("high"), before("medium"), before("low")].join(" ")
        }
    }
}

#[test]
fn a_seed_fixes_the_dataset() {
    assert_eq!(dataset(SEED, 300, 60), dataset(SEED, 300, 60));
    assert_ne!(dataset(SEED, 300, 60), dataset(SEED + 1, 300, 60));
    assert_eq!(dataset(SEED, 300, 60).1, dataset(SEED, 30, 60).1);
}

#[test]
fn held_out_prompts_are_new_and_unique() {
    let (train, held_out) = dataset(SEED, 6000, 600);
    let train: BTreeSet<_> = train.iter().map(|e| &e.prompt).collect();
    let held_out: BTreeSet<_> = held_out.iter().map(|e| &e.prompt).collect();
    assert_eq!((train.len(), held_out.len()), (6000, 600));
    assert!(train.is_disjoint(&held_out));
}

/// What determines the answer, read from the prompt alone.
fn substance(example: &Example) -> Vec<String> {
    let prompt = example.prompt.as_str();
    let words = words(prompt);
    let known = |table: &[&str]| words.iter().find(|w| table.contains(w)).unwrap().to_string();
    match example.skill {
        Skill::Route => vec![known(&MACHINES), broken(prompt).part.to_owned()],
        Skill::Remedy => vec![fault_of_code(&words).code.to_owned(), line_of(prompt)],
        Skill::Extract => vec![after(&words, "order").to_owned()],
        Skill::Date => vec![solve(example)],
        Skill::Limit => [known(&GAUGES).as_str(), "warn", "stop"]
            .map(|name| after(&words, name).to_owned())
            .to_vec(),
        Skill::Plan => {
            let mut machines: Vec<_> = solve(example).split(' ').map(str::to_owned).collect();
            machines.sort();
            machines
        }
    }
}

/// The number after "line", whatever its case.
fn line_of(prompt: &str) -> String {
    let at = prompt.find("ine ").unwrap() + 4;
    prompt[at..=at].to_owned()
}

/// Not only the prompt is new: the machine with its part, the code on its line, the order number,
/// the day, the reading with its limits and the set of machines are.
#[test]
fn held_out_questions_are_new_in_substance() {
    let (train, held_out) = dataset(SEED, 6000, 600);
    let train: BTreeSet<_> = train.iter().map(|e| (e.skill, substance(e))).collect();
    for example in &held_out {
        assert!(!train.contains(&(example.skill, substance(example))), "{example:?}");
    }
}

#[test]
fn reserved_faults_are_only_held_out() {
    let (train, held_out) = dataset(SEED, 3000, 600);
    let has_reserved = |examples: &[Example], skill: Skill, reserved: usize| {
        examples
            .iter()
            .filter(|e| e.skill == skill)
            .filter(|e| {
                FAULTS.iter().skip(reserved).step_by(8).any(|f| match skill {
                    Skill::Remedy => e.prompt.contains(f.code),
                    _ => {
                        e.prompt.contains(&f.cause())
                            || e.prompt.contains(&format!("the {} is {}", f.part, f.state))
                    }
                })
            })
            .count()
    };
    for (skill, reserved) in
        [(Skill::Route, RESERVED_FOR_ROUTE), (Skill::Remedy, RESERVED_FOR_REMEDY)]
    {
        assert_eq!(has_reserved(&train, skill, reserved), 0);
        let n = has_reserved(&held_out, skill, reserved);
        assert!((20..=70).contains(&n), "{n} of 100");
    }
}

#[test]
fn skills_are_balanced() {
    let (train, held_out) = dataset(SEED, 1000, 180);
    for skill in Skill::ALL {
        let count = |examples: &[Example]| examples.iter().filter(|e| e.skill == skill).count();
        assert!((166..=167).contains(&count(&train)));
        assert_eq!(count(&held_out), 30);
    }
}

#[test]
fn answers_follow_from_the_prompts() {
    let (train, held_out) = dataset(SEED, 3000, 600);
    for example in train.iter().chain(&held_out) {
        assert_eq!(example.completion, format!(" {}", solve(example)), "{}", example.prompt);
    }
}

/// No constant answer gets far: of the held-out examples of a skill at most four in ten agree.
#[test]
fn no_answer_dominates_its_skill() {
    let (_, held_out) = dataset(SEED, 0, 1200);
    for skill in Skill::ALL {
        let answers: Vec<_> =
            held_out.iter().filter(|e| e.skill == skill).map(|e| &e.completion).collect();
        let most = answers.iter().map(|a| answers.iter().filter(|b| b == &a).count()).max();
        assert!(most.unwrap() * 10 <= answers.len() * 4, "{skill}: {most:?} of {}", answers.len());
    }
}

#[test]
fn the_corpus_has_no_cue_and_no_prompt_lacks_it() {
    let corpus = corpus(SEED, 3000);
    let (train, _) = dataset(SEED, 600, 0);
    for skill in Skill::ALL {
        assert!(corpus.iter().all(|d| !d.contains(skill.cue())), "{skill}");
        assert!(train.iter().filter(|e| e.skill == skill).all(|e| e.prompt.contains(skill.cue())));
    }
}

#[test]
fn jsonl_has_one_object_a_line() {
    let (train, _) = dataset(SEED, 12, 0);
    let text = to_jsonl(&train);
    assert_eq!(text.lines().count(), 12);
    for (line, example) in text.lines().zip(&train) {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(value["prompt"], example.prompt.as_str());
        assert_eq!(value["completion"], example.completion.as_str());
        assert_eq!(value["skill"], example.skill.name());
    }
}

/// Samples are short, and every token of theirs is one that the base has seen in its text.
#[test]
fn samples_are_short_and_of_known_tokens() {
    let documents = corpus(SEED, 2000);
    let tokenizer = train_tokenizer(&documents, VOCAB_SIZE).unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let known: BTreeSet<u32> = documents.iter().flat_map(|d| ids(d)).collect();
    let (train, _) = dataset(SEED, 600, 0);
    for skill in Skill::ALL {
        let of_skill: Vec<_> = train.iter().filter(|e| e.skill == skill).collect();
        let mut totals: Vec<usize> = Vec::new();
        for example in of_skill {
            let (prompt, completion) = (ids(&example.prompt), ids(&example.completion));
            assert!(completion.len() <= 12, "{example:?}: {}", completion.len());
            assert!(completion.iter().all(|id| known.contains(id)), "{example:?}");
            totals.push(prompt.len() + completion.len());
        }
        totals.sort_unstable();
        let (median, longest) = (totals[totals.len() / 2], totals[totals.len() - 1]);
        assert!((12..=45).contains(&median) && longest <= 60, "{skill}: {median}, {longest}");
    }
}
