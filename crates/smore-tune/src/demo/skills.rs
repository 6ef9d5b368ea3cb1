//! The demo's fine-tuning data: six skills of a maintenance desk, with a held-out part.
//!
//! Every prompt ends with a cue that the pre-training text never uses, so the base knows the
//! ingredients but not what is asked. What determines an answer also determines whether an example
//! is for training or held out (see `Part`), so no held-out question is ever trained on. Four of
//! the 32 faults of the two fault skills are kept out of training altogether: there the adapter
//! has to use what the base has read.

use std::collections::BTreeSet;
use std::fmt;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::facts::{
    Date, FAULTS, Fault, Level, MACHINES, PRIORITIES, Reading, WEEKDAYS, fault_of_another_crew,
    pick, pick_several, wording,
};

/// What an example asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skill {
    /// Names the crew that a complaint goes to.
    Route,
    /// Recalls the remedy of a fault code.
    Remedy,
    /// Copies the number that is asked for, out of three.
    Extract,
    /// Rewrites an ISO date as day and month.
    Date,
    /// Judges a reading against two limits.
    Limit,
    /// Orders three machines by the priority of their jobs.
    Plan,
}

impl Skill {
    /// All skills.
    pub const ALL: [Self; 6] =
        [Self::Route, Self::Remedy, Self::Extract, Self::Date, Self::Limit, Self::Plan];

    /// Short name, as in the `skill` key of the data.
    pub fn name(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Remedy => "remedy",
            Self::Extract => "extract",
            Self::Date => "date",
            Self::Limit => "limit",
            Self::Plan => "plan",
        }
    }

    /// One line for people.
    pub fn description(self) -> &'static str {
        match self {
            Self::Route => "send a complaint to the right one of four crews",
            Self::Remedy => "recall the remedy of a fault code",
            Self::Extract => "copy the number asked for out of three",
            Self::Date => "rewrite 2026-03-09 as 9 Mar",
            Self::Limit => "judge a reading against two limits: OK, WARN or STOP",
            Self::Plan => "put three machines in the order of their priorities",
        }
    }

    /// Words that every prompt of this skill has and the pre-training text has not.
    pub fn cue(self) -> &'static str {
        match self {
            Self::Route => "Send to:",
            Self::Remedy => "To do:",
            Self::Extract => "Give the",
            Self::Date => "Label:",
            Self::Limit => "Mark:",
            Self::Plan => "In turn:",
        }
    }

    fn draw(self, rng: &mut ChaCha8Rng) -> Draft {
        match self {
            Self::Route => route(rng),
            Self::Remedy => remedy(rng),
            Self::Extract => extract(rng),
            Self::Date => date(rng),
            Self::Limit => limit(rng),
            Self::Plan => plan(rng),
        }
    }
}

impl fmt::Display for Skill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A prompt and the one right completion, which begins with a space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// What it asks for.
    pub skill: Skill,
    /// Text given to the model.
    pub prompt: String,
    /// Text that the model must give, up to the end of the sequence.
    pub completion: String,
}

/// Training and held-out examples, the same ones for the same arguments.
///
/// Skills are balanced to within one example. Training examples are shuffled; held-out examples go
/// round the skills in turn. No prompt is in both parts. Within a part a prompt repeats only where
/// far more examples are asked for than a skill has different prompts (thousands each).
pub fn dataset(seed: u64, n_train: usize, n_heldout: usize) -> (Vec<Example>, Vec<Example>) {
    let mut train: Vec<_> = part(seed, Part::Train, n_train);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::MAX);
    train.shuffle(&mut rng);
    (train, part(seed, Part::HeldOut, n_heldout))
}

/// One JSON object a line with the keys `prompt`, `completion` and `skill`.
pub fn to_jsonl(examples: &[Example]) -> String {
    let mut text = String::new();
    for Example { skill, prompt, completion } in examples {
        let line = json!({"prompt": prompt, "completion": completion, "skill": skill.name()});
        text.push_str(&line.to_string());
        text.push('\n');
    }
    text
}

/// The side of the split that an example is on. It follows from the facts that determine the
/// answer, which the prompt states in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Train,
    HeldOut,
}

impl Part {
    /// One key in five is held out.
    fn of_key(key: usize) -> Self {
        if key.is_multiple_of(5) { Self::HeldOut } else { Self::Train }
    }

    /// As [`Part::of_key`], but every eighth fault, one of each crew, is always held out.
    fn of_fault(fault: usize, reserved: usize, other: usize) -> Self {
        if fault % 8 == reserved { Self::HeldOut } else { Self::of_key(fault + other) }
    }
}

/// Which fault of each eight is never trained on, so that the two skills reserve different ones.
const RESERVED_FOR_ROUTE: usize = 1;
const RESERVED_FOR_REMEDY: usize = 4;

struct Draft {
    prompt: String,
    answer: String,
    part: Part,
}

/// `n` examples of one part, going round the skills.
fn part(seed: u64, part: Part, n: usize) -> Vec<Example> {
    let mut rngs: Vec<ChaCha8Rng> = (0..Skill::ALL.len())
        .map(|i| {
            // A stream of its own for each skill and part: asking for more of one moves no other.
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(2 * i as u64 + u64::from(part == Part::HeldOut));
            rng
        })
        .collect();
    let mut seen = BTreeSet::new();
    (0..n)
        .map(|i| {
            let of = i % Skill::ALL.len();
            example(Skill::ALL[of], part, &mut rngs[of], &mut seen)
        })
        .collect()
}

fn example(skill: Skill, part: Part, rng: &mut ChaCha8Rng, seen: &mut BTreeSet<String>) -> Example {
    const TRIES: usize = 1000;
    let mut tries = 0;
    loop {
        let draft = skill.draw(rng);
        if draft.part != part {
            continue;
        }
        tries += 1;
        if seen.insert(draft.prompt.clone()) || tries == TRIES {
            return Example {
                skill,
                prompt: draft.prompt,
                completion: format!(" {}", draft.answer),
            };
        }
    }
}

fn route(rng: &mut ChaCha8Rng) -> Draft {
    let (f, m) = (rng.random_range(0..FAULTS.len()), rng.random_range(0..MACHINES.len()));
    let (fault, machine) = (&FAULTS[f], MACHINES[m]);
    let Fault { state, part, .. } = fault;
    let line = rng.random_range(1..=9);
    let sound = fault_of_another_crew(rng, fault).part;
    let complaint = wording(
        rng,
        [
            format!("Call: {state} {part} on the {machine}, line {line}."),
            format!("The {machine} of line {line} has a {state} {part}."),
            format!("Line {line}, {machine}: the {sound} is fine, the {part} is {state}."),
        ],
    );
    Draft {
        prompt: format!("{complaint} Send to:"),
        answer: fault.crew.name().to_owned(),
        part: Part::of_fault(f, RESERVED_FOR_ROUTE, m),
    }
}

fn remedy(rng: &mut ChaCha8Rng) -> Draft {
    let f = rng.random_range(0..FAULTS.len());
    let fault = &FAULTS[f];
    let Fault { code, machine, .. } = fault;
    let line = rng.random_range(1..=9);
    let weekday = pick(rng, &WEEKDAYS);
    let alarm = wording(
        rng,
        [
            format!("Alarm {code}, {machine}, line {line}, {weekday}."),
            format!("{weekday}: the {machine} of line {line} gave {code}."),
            format!("Line {line} has {code}, {weekday}."),
        ],
    );
    Draft {
        prompt: format!("{alarm} To do:"),
        answer: fault.remedy(),
        part: Part::of_fault(f, RESERVED_FOR_REMEDY, line),
    }
}

fn extract(rng: &mut ChaCha8Rng) -> Draft {
    let order = rng.random_range(1000..=9999);
    let mut fields = [
        ("order", order),
        ("badge", rng.random_range(100..=999)),
        ("tag", rng.random_range(100..=999)),
    ];
    let (asked, number) = pick(rng, &fields);
    fields.shuffle(rng);
    let [a, b, c] = fields.map(|(name, number)| format!("{name} {number}"));
    let note = wording(
        rng,
        [
            format!("Memo: {a} with {b} and {c}."),
            format!("Desk: {a}; {b}; {c}."),
            format!("All about {a}, {b} and {c}."),
        ],
    );
    Draft {
        prompt: format!("{note} Give the {asked}:"),
        answer: number.to_string(),
        part: Part::of_key(order),
    }
}

fn date(rng: &mut ChaCha8Rng) -> Draft {
    let date = Date::draw(rng);
    let iso = date.iso();
    let entry = wording(
        rng,
        [format!("Form of {iso}."), format!("Arrived {iso}."), format!("Visit: {iso}.")],
    );
    Draft {
        prompt: format!("{entry} Label:"),
        answer: date.short(),
        part: Part::of_key((date.month + date.day) as usize),
    }
}

fn limit(rng: &mut ChaCha8Rng) -> Draft {
    let reading = Reading::draw(rng);
    let Reading { gauge, value, warn, stop } = reading;
    let check = wording(
        rng,
        [
            format!("Check: {gauge} {value}, warn {warn}, stop {stop}."),
            format!("Panel: {gauge} = {value}; warn = {warn}; stop = {stop}."),
            format!("Test: warn {warn}, stop {stop}, {gauge} {value}."),
        ],
    );
    let verdict = match reading.level() {
        Level::Normal => "OK",
        Level::Raised => "WARN",
        Level::Critical => "STOP",
    };
    Draft {
        prompt: format!("{check} Mark:"),
        answer: verdict.to_owned(),
        part: Part::of_key((value + warn / 10 + stop / 10) as usize),
    }
}

fn plan(rng: &mut ChaCha8Rng) -> Draft {
    let indices: Vec<usize> = (0..MACHINES.len()).collect();
    let urgent_first: [usize; 3] = pick_several(rng, &indices);
    let mut jobs = [0, 1, 2].map(|i| (MACHINES[urgent_first[i]], PRIORITIES[i]));
    jobs.shuffle(rng);
    let [x, y, z] = jobs;
    let backlog = wording(
        rng,
        [
            format!("Backlog: {} {}, {} {}, {} {}.", x.0, x.1, y.0, y.1, z.0, z.1),
            format!("Waiting: {} - {}, {} - {}, {} - {}.", x.0, x.1, y.0, y.1, z.0, z.1),
            format!("Jobs: {} = {}; {} = {}; {} = {}.", x.0, x.1, y.0, y.1, z.0, z.1),
        ],
    );
    Draft {
        prompt: format!("{backlog} In turn:"),
        answer: urgent_first.map(|i| MACHINES[i]).join(" "),
        part: Part::of_key(urgent_first.iter().sum()),
    }
}

#[cfg(test)]
#[path = "skills_tests.rs"]
mod tests;
