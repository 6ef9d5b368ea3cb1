//! The text that the demo's base is pre-trained on: short documents of a maintenance desk.
//!
//! Facts are always those of the tables in `facts`; names and numbers are drawn anew for each
//! document and come back later in it, so that the base learns to copy from its context. Every
//! skill of the demo finds its ingredients here, none finds its own wording.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::facts::{
    Crew, Date, FAULTS, Fault, Level, MACHINES, PEOPLE, PRIORITIES, Reading, WEEKDAYS, any_fault,
    fault_of_another_crew, pick, pick_several, wording,
};

/// `n_documents` documents, the same ones for the same `seed`.
pub fn corpus(seed: u64, n_documents: usize) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n_documents).map(|_| document(&mut rng)).collect()
}

/// One document of a random kind.
pub fn document(rng: &mut ChaCha8Rng) -> String {
    // What takes the base longest to learn stands twice.
    const KINDS: [fn(&Scene, &mut ChaCha8Rng) -> String; 16] = [
        shift_log,
        work_order,
        ticket,
        desk_register,
        fault_report,
        fault_report,
        fault_talk,
        crew_log,
        parts_request,
        handover,
        handover,
        inspection,
        inspection,
        delivery,
        calendar,
        serials,
    ];
    let scene = Scene::draw(rng);
    pick(rng, &KINDS)(&scene, rng)
}

/// What a document is about.
struct Scene {
    who: &'static str,
    other: &'static str,
    weekday: &'static str,
    line: u32,
    order: u32,
    badge: u32,
    tag: u32,
    date: Date,
    fault: &'static Fault,
}

impl Scene {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let [who, other] = pick_several(rng, &PEOPLE);
        Self {
            who,
            other,
            weekday: pick(rng, &WEEKDAYS),
            line: rng.random_range(1..=9),
            order: rng.random_range(1000..=9999),
            badge: rng.random_range(100..=999),
            tag: rng.random_range(100..=999),
            date: Date::draw(rng),
            fault: any_fault(rng),
        }
    }
}

fn shift_log(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, other, weekday, line, order, .. } = s;
    let machine = pick(rng, &MACHINES);
    let opening = wording(
        rng,
        [
            format!("{weekday}, line {line}. {who} opened order {order} for the {machine}."),
            format!("Shift log, {weekday}. Order {order} is open: {machine} on line {line}."),
            format!("{who} is on line {line}. The {machine} waits for order {order}."),
        ],
    );
    let event = wording(
        rng,
        [
            format!("{other} checked the {machine}."),
            format!("{other} looked after the {machine} on line {line}."),
            format!("Nothing new from {other}."),
        ],
    );
    let closing = wording(
        rng,
        [
            format!("{who} closed order {order} on {weekday}."),
            format!("Order {order} is closed, the {machine} runs again on line {line}."),
            format!("{who} handed order {order} to {other}. {other} closed order {order}."),
        ],
    );
    format!("{opening} {event} {closing}")
}

fn work_order(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, line, order, badge, tag, fault, date, .. } = s;
    let mut fields = [
        format!("Order: {order}"),
        format!("Badge: {badge}"),
        format!("Tag: {tag}"),
        format!("Machine: {}", fault.machine),
        format!("Date: {}", date.iso()),
    ];
    shuffle(rng, &mut fields);
    let head = fields[..4].join("\n");
    let tail = wording(
        rng,
        [
            format!(
                "{who} took order {order} with badge {badge}. The {} has tag {tag}.",
                fault.machine
            ),
            format!(
                "Tag {tag} is the {} on line {line}. Badge {badge} signed order {order}.",
                fault.machine
            ),
            format!("Work on order {order}: {}. Signed by badge {badge}.", fault.remedy()),
        ],
    );
    format!("Work order\n{head}\n{tail}")
}

/// The three numbers of a ticket in a sentence, then once more as a list, or the other way round.
fn ticket(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, order, badge, tag, .. } = s;
    let mut named = [format!("order {order}"), format!("badge {badge}"), format!("tag {tag}")];
    shuffle(rng, &mut named);
    let [a, b, c] = &named;
    let prose = wording(
        rng,
        [
            format!("{who} wrote a ticket with {a}, {b} and {c}."),
            format!("The ticket of {who} names {a} and {b}, then {c}."),
            format!("Ticket from {who}: {a}, {b}, {c}."),
        ],
    );
    let mut again = named.clone();
    shuffle(rng, &mut again);
    let [x, y, z] = &again;
    let repeat = wording(
        rng,
        [
            format!("Copied to the desk: {x}, {y}, {z}."),
            format!("So the {x} and {y} are right."),
            format!("Order: {order}\nTag: {tag}\nBadge: {badge}"),
            format!("The badge is {badge}, the order is {order}, the tag is {tag}."),
            format!("The tag is {tag}. The badge is {badge}. The order is {order}."),
        ],
    );
    format!("{prose}\n{repeat}")
}

/// Three people with a number each; then one is asked for.
fn desk_register(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let people: [&str; 3] = pick_several(rng, &PEOPLE);
    let numbers: [u32; 3] = std::array::from_fn(|_| rng.random_range(100..=999));
    let what = pick(rng, &["badge", "tag"]);
    let rows: Vec<String> =
        (0..3).map(|i| format!("{} has {what} {}", people[i], numbers[i])).collect();
    let asked = rng.random_range(0..3);
    let (name, number) = (people[asked], numbers[asked]);
    let question = wording(
        rng,
        [
            format!("Which {what} has {name}? {name} has {what} {number}."),
            format!("The {what} of {name} is {number}."),
            format!("{} asked for {name}: it is {number}.", s.who),
        ],
    );
    format!("{}.\n{question}", rows.join(", "))
}

fn fault_report(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, line, fault, .. } = s;
    let Fault { code, machine, .. } = fault;
    let (cause, remedy, crew) = (fault.cause(), fault.remedy(), fault.crew.name());
    wording(
        rng,
        [
            format!(
                "Fault {code}\nMachine: {machine}\nCause: {cause}\nRemedy: {remedy}\nCrew: {crew}"
            ),
            format!("Fault {code} on the {machine} means {cause}. The remedy is to {remedy}."),
            format!("{who} read {code} on the {machine}. Cause: {cause}. Remedy: {remedy}."),
            format!(
                "Line {line}: {machine} with {code}. It was {cause}, so {who} had to {remedy}."
            ),
            format!("To cure {code}, {remedy}. It comes from {cause} and is {crew} work."),
            format!("{code}: {remedy}. {code} is only seen on the {machine}, by {cause}."),
        ],
    )
}

fn fault_talk(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, other, line, fault, .. } = s;
    let Fault { code, machine, state, part, verb, .. } = fault;
    let report = wording(
        rng,
        [
            format!("{who}: The {machine} on line {line} shows {code}."),
            format!("{who}: I have {code} on the {machine}."),
            format!("{who}: What is {code} on the {machine}?"),
        ],
    );
    let answer = wording(
        rng,
        [
            format!("{other}: {code} is the {state} {part}. You must {verb} the {part}."),
            format!("{other}: That is {code}, {state} {part}. Please {verb} {part}."),
            format!("{other}: For {code} we {verb} {part}."),
        ],
    );
    let thanks = wording(
        rng,
        [
            format!("{who}: Good, I {verb} the {part}."),
            format!("{who}: Thank you, {other}."),
            format!("{who}: Then I call the {} crew.", fault.crew.name()),
        ],
    );
    format!("{report}\n{answer}\n{thanks}")
}

/// Which crew went where. Here a fault may show on any machine; only its code is tied to one.
fn crew_log(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, line, fault, weekday, .. } = s;
    let Fault { state, part, .. } = fault;
    let crew = fault.crew.name();
    let sound = fault_of_another_crew(rng, fault);
    let machine = pick(rng, &MACHINES);
    let list = crew_list(fault.crew, rng);
    wording(
        rng,
        [
            format!("{weekday}: {state} {part} on the {machine}, {crew} crew called."),
            format!("The {crew} crew came to line {line} because of a {state} {part}."),
            format!("A {state} {part} is {crew} work. The {crew} crew went to the {machine}."),
            format!(
                "On the {machine} the {} is fine but the {part} is {state}. The {crew} crew came.",
                sound.part
            ),
            format!(
                "The {part} is {state}, the {} is fine: a {crew} matter, says {who}.",
                sound.part
            ),
            format!("Crew: {crew}\nMachine: {machine}\nFound: {state} {part}"),
            list,
        ],
    )
}

fn crew_list(crew: Crew, rng: &mut ChaCha8Rng) -> String {
    let parts: Vec<&str> = FAULTS.iter().filter(|f| f.crew == crew).map(|f| f.part).collect();
    let [a, b, c] = pick_several(rng, &parts);
    format!("The {} crew looks after {a}, {b} and {c}.", crew.name())
}

fn parts_request(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, other, order, fault, tag, .. } = s;
    let Fault { part, bin, code, .. } = fault;
    let request = wording(
        rng,
        [
            format!("{who} needs a {part} for order {order}."),
            format!("Parts request, order {order}: one {part}."),
            format!("Part: {part}\nBin: {bin}\nOrder: {order}"),
        ],
    );
    let answer = wording(
        rng,
        [
            format!("The {part} is in bin {bin}. {other} brought it for order {order}."),
            format!(
                "Bin {bin} holds the {part}. The {part} got tag {tag}, order {order}, tag {tag}."
            ),
            format!("For {code} take the {part} from bin {bin}."),
        ],
    );
    format!("{request}\n{answer}")
}

/// Three jobs with priorities, then the same jobs in the order of work.
fn handover(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, other, .. } = s;
    let urgent_first: [&str; 3] = pick_several(rng, &MACHINES);
    let [a, b, c] = urgent_first;
    let mut jobs = [0, 1, 2].map(|i| (urgent_first[i], PRIORITIES[i]));
    shuffle(rng, &mut jobs);
    let [x, y, z] = jobs;
    let note = wording(
        rng,
        [
            format!(
                "Handover from {who} to {other}. The {} is {}, the {} is {} and the {} is {}.",
                x.0, x.1, y.0, y.1, z.0, z.1
            ),
            format!("Jobs of {who}: {} {}, {} {}, {} {}.", x.0, x.1, y.0, y.1, z.0, z.1),
            format!("{}: {}\n{}: {}\n{}: {}.", x.0, x.1, y.0, y.1, z.0, z.1),
            format!(
                "Priority {} for the {}, {} for the {}, {} for the {}.",
                x.1, x.0, y.1, y.0, z.1, z.0
            ),
        ],
    );
    let plan = wording(
        rng,
        [
            format!("First the {a}, then the {b}, last the {c}."),
            format!("{other} starts with the {a}, goes on with the {b} and ends with the {c}."),
            format!("Plan of {other}: 1. {a} 2. {b} 3. {c}"),
            format!("High is the {a}, medium the {b}, low the {c}. So {a}, {b}, {c}."),
        ],
    );
    format!("{note} {plan}")
}

/// Up to two gauges against their limits.
fn inspection(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let machine = pick(rng, &MACHINES);
    let first = gauge_line(&Reading::draw(rng), machine, rng);
    let head = format!("Inspection of the {machine} by {}.", s.who);
    if rng.random_bool(0.5) {
        let second = gauge_line(&Reading::draw(rng), machine, rng);
        format!("{head}\n{first}\n{second}")
    } else {
        format!("{head} {first}")
    }
}

fn gauge_line(r: &Reading, machine: &str, rng: &mut ChaCha8Rng) -> String {
    let Reading { gauge, value, warn, stop } = r;
    let (word, action) = match r.level() {
        Level::Normal => ("normal", format!("the {machine} may run")),
        Level::Raised => ("raised", format!("keep an eye on the {machine}")),
        Level::Critical => ("critical", format!("the {machine} must stop")),
    };
    wording(
        rng,
        [
            format!("The {gauge} is {value}, warn at {warn}, stop at {stop}: {word}, {action}."),
            format!("With warn {warn} and stop {stop}, a {gauge} of {value} is {word}."),
            format!("{gauge}: {value} (warn {warn}, stop {stop}) {word}"),
            format!(
                "Limits for {gauge}: warn {warn}, stop {stop}. Now {value}, so {word}: {action}."
            ),
        ],
    )
}

fn delivery(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, order, date, fault, .. } = s;
    let (iso, short, part) = (date.iso(), date.short(), fault.part);
    wording(
        rng,
        [
            format!("The {part} for order {order} comes on {short} ({iso})."),
            format!("Due {iso}, that is {short}. {who} waits for the {part} until {short}."),
            format!("{who} filed order {order} of {short} under {iso}."),
            format!("Date: {iso}\nOrder: {order}\n{who} has it in the book as {short}."),
            format!("Promised for {iso}. On {short} the {part} came, order {order}."),
        ],
    )
}

/// Three dates in one form, then in the other.
fn calendar(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let dates: [Date; 3] = std::array::from_fn(|_| Date::draw(rng));
    let iso = dates.map(Date::iso).join(", ");
    let short = dates.map(Date::short).join(", ");
    wording(
        rng,
        [
            format!("Dates of {}: {iso}. In short {short}.", s.who),
            format!("{} comes on {short}. Filed under {iso}.", s.who),
            dates.map(|d| format!("{} is {}", d.iso(), d.short())).join("\n"),
        ],
    )
}

/// Random letters to copy. They also show the base every letter and sign on its own, so that it
/// can spell words it has never read.
fn serials(s: &Scene, rng: &mut ChaCha8Rng) -> String {
    let Scene { who, other, .. } = s;
    let [a, b]: [&str; 2] = pick_several(rng, &MACHINES);
    let (x, y) = (serial(rng), serial(rng));
    let list = wording(
        rng,
        [
            format!("Serials: {a} = {x}; {b} = {y}."),
            format!("{who} spells {x} for the {a} - and {y} for the {b}."),
            format!("{a} = {x}; {b} = {y}; noted by {who}."),
        ],
    );
    let repeat = wording(
        rng,
        [
            format!("{other} read {x} and {y}."),
            format!("The {b} has {y}, the {a} has {x}."),
            format!("{a}: {x}"),
        ],
    );
    format!("{list} {repeat}")
}

/// A digit and two to four letters of one case, as in 7xqk.
fn serial(rng: &mut ChaCha8Rng) -> String {
    let first = if rng.random_bool(0.5) { b'A' } else { b'a' };
    let letters: String =
        (0..rng.random_range(2..=4)).map(|_| char::from(first + rng.random_range(0..26))).collect();
    format!("{}{letters}", rng.random_range(1..=9))
}

fn shuffle<T>(rng: &mut ChaCha8Rng, items: &mut [T]) {
    rand::seq::SliceRandom::shuffle(items, rng);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_fixes_the_corpus() {
        assert_eq!(corpus(7, 50), corpus(7, 50));
        assert_ne!(corpus(7, 50), corpus(8, 50));
        assert_eq!(corpus(7, 50)[..20], corpus(7, 20));
    }

    #[test]
    fn documents_hardly_ever_repeat() {
        let documents = corpus(1, 5000);
        let different: BTreeSet<_> = documents.iter().collect();
        assert!(different.len() > 4500, "{} of 5000", different.len());
    }

    #[test]
    fn documents_are_plain_ascii() {
        assert!(corpus(2, 2000).iter().all(|d| d.is_ascii() && !d.is_empty()));
    }

    /// A code always stands with its own machine, cause and remedy.
    #[test]
    fn fault_facts_are_constant() {
        for document in corpus(3, 5000).iter().filter(|d| d.starts_with("Fault ")) {
            let fault = FAULTS.iter().find(|f| document[6..].starts_with(f.code));
            let fault = fault.unwrap_or_else(|| panic!("unknown code in {document}"));
            assert!(document.contains(fault.machine), "{document}");
            assert!(document.contains(&fault.cause()), "{document}");
            assert!(document.contains(&fault.remedy()), "{document}");
        }
    }

    /// Every order number that a document names first comes back in most documents that name one:
    /// this is what copying is learned from.
    #[test]
    fn numbers_come_back_in_their_document() {
        let documents = corpus(4, 2000);
        let (mut named, mut repeated) = (0, 0);
        for document in &documents {
            let Some(at) = document.find("rder ") else {
                continue;
            };
            let number: String =
                document[at + 5..].chars().take_while(char::is_ascii_digit).collect();
            if number.len() == 4 {
                named += 1;
                repeated += usize::from(document.matches(&number).count() > 1);
            }
        }
        assert!(named > 500 && repeated * 3 > named * 2, "{repeated} of {named}");
    }
}
