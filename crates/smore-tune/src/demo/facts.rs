//! The small world of the demo: machines, faults, crews, gauges and dates.
//!
//! The pre-training text and the skills draw from the same tables, so that what the base has read
//! stays true when a skill asks for it.

use rand::seq::{IndexedRandom, index};
use rand::{Rng, RngExt};

/// Machines of the factory.
pub(super) const MACHINES: [&str; 10] =
    ["press", "lathe", "mill", "saw", "pump", "crane", "oven", "drill", "mixer", "robot"];

/// People of the maintenance desk.
pub(super) const PEOPLE: [&str; 8] =
    ["Anna", "Ben", "Carla", "Dan", "Eva", "Finn", "Greta", "Hugo"];

/// Days of the working week. They stand alone, never beside a date, so none can be wrong.
pub(super) const WEEKDAYS: [&str; 6] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Short names of the months.
pub(super) const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// What an inspection reads.
pub(super) const GAUGES: [&str; 5] = ["heat", "load", "speed", "noise", "pressure"];

/// Priorities of jobs, most urgent first.
pub(super) const PRIORITIES: [&str; 3] = ["high", "medium", "low"];

/// The crew that a fault belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crew {
    Mechanical,
    Electrical,
    Hydraulic,
    Control,
}

impl Crew {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Mechanical => "mechanical",
            Self::Electrical => "electrical",
            Self::Hydraulic => "hydraulic",
            Self::Control => "control",
        }
    }
}

/// A fault that the factory knows: its code, where it shows, what is wrong and what helps.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) code: &'static str,
    pub(super) machine: &'static str,
    /// State of the part, as in "leaking hose".
    pub(super) state: &'static str,
    pub(super) part: &'static str,
    /// What to do with the part, as in "replace hose".
    pub(super) verb: &'static str,
    pub(super) crew: Crew,
    /// Where the store keeps the part.
    pub(super) bin: &'static str,
}

impl Fault {
    pub(super) fn cause(&self) -> String {
        format!("{} {}", self.state, self.part)
    }

    pub(super) fn remedy(&self) -> String {
        format!("{} {}", self.verb, self.part)
    }
}

const fn fault(
    code: &'static str,
    machine: &'static str,
    (state, part): (&'static str, &'static str),
    verb: &'static str,
    crew: Crew,
    bin: &'static str,
) -> Fault {
    Fault { code, machine, state, part, verb, crew, bin }
}

use Crew::{Control, Electrical, Hydraulic, Mechanical};

/// All faults. A part belongs to one fault, so a part names its crew; a state does not.
pub(super) const FAULTS: [Fault; 32] = [
    fault("E14", "lathe", ("worn", "bearing"), "replace", Mechanical, "C4"),
    fault("K72", "mixer", ("bent", "shaft"), "align", Mechanical, "A7"),
    fault("F35", "crane", ("loose", "bolt"), "tighten", Mechanical, "B2"),
    fault("H91", "mill", ("cracked", "gear"), "replace", Mechanical, "D9"),
    fault("F28", "saw", ("jammed", "chain"), "free", Mechanical, "A3"),
    fault("E63", "drill", ("broken", "spring"), "replace", Mechanical, "C8"),
    fault("H47", "saw", ("dull", "blade"), "grind", Mechanical, "D1"),
    fault("K19", "press", ("bent", "guard"), "align", Mechanical, "B6"),
    fault("K56", "oven", ("burnt", "fuse"), "replace", Electrical, "D4"),
    fault("F82", "mixer", ("burnt", "coil"), "replace", Electrical, "A9"),
    fault("E37", "robot", ("loose", "plug"), "tighten", Electrical, "C2"),
    fault("H25", "crane", ("dead", "battery"), "charge", Electrical, "B8"),
    fault("E98", "drill", ("broken", "cable"), "replace", Electrical, "D6"),
    fault("K41", "lathe", ("worn", "brush"), "replace", Electrical, "A1"),
    fault("F13", "pump", ("dirty", "motor"), "clean", Electrical, "C7"),
    fault("H69", "oven", ("cracked", "lamp"), "replace", Electrical, "B3"),
    fault("H34", "press", ("leaking", "hose"), "replace", Hydraulic, "B9"),
    fault("E75", "pump", ("jammed", "valve"), "free", Hydraulic, "C1"),
    fault("K23", "pump", ("worn", "seal"), "replace", Hydraulic, "A6"),
    fault("F94", "mill", ("dirty", "filter"), "clean", Hydraulic, "D3"),
    fault("F57", "press", ("broken", "pipe"), "weld", Hydraulic, "B4"),
    fault("K86", "mixer", ("leaking", "tank"), "weld", Hydraulic, "C9"),
    fault("E42", "crane", ("jammed", "piston"), "free", Hydraulic, "A8"),
    fault("H18", "lathe", ("dirty", "oil"), "change", Hydraulic, "D2"),
    fault("F61", "robot", ("dead", "screen"), "replace", Control, "C6"),
    fault("H53", "mill", ("frozen", "panel"), "reset", Control, "B1"),
    fault("K95", "robot", ("wrong", "program"), "change", Control, "D7"),
    fault("E29", "saw", ("wrong", "sensor"), "align", Control, "A4"),
    fault("K38", "oven", ("wrong", "timer"), "reset", Control, "C3"),
    fault("F46", "drill", ("frozen", "counter"), "reset", Control, "B7"),
    fault("H84", "saw", ("dirty", "camera"), "clean", Control, "D8"),
    fault("E51", "robot", ("dead", "switch"), "replace", Control, "A2"),
];

/// One of `items`, each as likely as the others.
pub(super) fn pick<T: Copy>(rng: &mut impl Rng, items: &[T]) -> T {
    *items.choose(rng).expect("tables are not empty")
}

/// One of several wordings.
pub(super) fn wording<const N: usize>(rng: &mut impl Rng, mut texts: [String; N]) -> String {
    std::mem::take(&mut texts[rng.random_range(0..N)])
}

/// `N` different items in random order.
pub(super) fn pick_several<T: Copy, const N: usize>(rng: &mut impl Rng, items: &[T]) -> [T; N] {
    index::sample_array::<_, N>(rng, items.len()).expect("tables are long enough").map(|i| items[i])
}

/// Any fault.
pub(super) fn any_fault(rng: &mut impl Rng) -> &'static Fault {
    &FAULTS[rng.random_range(0..FAULTS.len())]
}

/// A fault of another crew than `than`.
pub(super) fn fault_of_another_crew(rng: &mut impl Rng, than: &Fault) -> &'static Fault {
    loop {
        let other = any_fault(rng);
        if other.crew != than.crew {
            return other;
        }
    }
}

/// A day of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    pub(super) year: u32,
    pub(super) month: u32,
    pub(super) day: u32,
}

impl Date {
    /// A day from 2022 to 2029. The 29th to 31st are left out: no month lacks the others.
    pub(super) fn draw(rng: &mut impl Rng) -> Self {
        Self {
            year: rng.random_range(2022..=2029),
            month: rng.random_range(1..=12),
            day: rng.random_range(1..=28),
        }
    }

    /// As in 2026-03-09.
    pub(super) fn iso(self) -> String {
        format!("{}-{:02}-{:02}", self.year, self.month, self.day)
    }

    /// As in 9 Mar.
    pub(super) fn short(self) -> String {
        format!("{} {}", self.day, MONTHS[self.month as usize - 1])
    }
}

/// How a reading stands to its two limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// Below both limits.
    Normal,
    /// At or above the first limit.
    Raised,
    /// At or above the second limit.
    Critical,
}

/// A gauge with its two limits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) gauge: &'static str,
    pub(super) value: u32,
    pub(super) warn: u32,
    pub(super) stop: u32,
}

impl Reading {
    /// Limits are full tens and every level is equally likely, so that a guess is right once in
    /// three.
    pub(super) fn draw(rng: &mut impl Rng) -> Self {
        let warn = 10 * rng.random_range(3..=7);
        let stop = warn + 10 * rng.random_range(1..=2);
        let value = match pick(rng, &[Level::Normal, Level::Raised, Level::Critical]) {
            Level::Normal => rng.random_range(warn - 20..warn),
            Level::Raised => rng.random_range(warn..stop),
            Level::Critical => rng.random_range(stop..(stop + 20).min(100)),
        };
        Self { gauge: pick(rng, &GAUGES), value, warn, stop }
    }

    pub(super) fn level(&self) -> Level {
        if self.value >= self.stop {
            Level::Critical
        } else if self.value >= self.warn {
            Level::Raised
        } else {
            Level::Normal
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn codes_parts_and_bins_are_unique() {
        for field in [|f: &Fault| f.code, |f: &Fault| f.part, |f: &Fault| f.bin] {
            let seen: BTreeSet<_> = FAULTS.iter().map(field).collect();
            assert_eq!(seen.len(), FAULTS.len());
        }
    }

    #[test]
    fn crews_share_the_faults_equally_and_machines_exist() {
        for crew in [Mechanical, Electrical, Hydraulic, Control] {
            assert_eq!(FAULTS.iter().filter(|f| f.crew == crew).count(), 8);
        }
        assert!(FAULTS.iter().all(|f| MACHINES.contains(&f.machine)));
    }

    #[test]
    fn dates_have_two_forms() {
        let date = Date { year: 2026, month: 3, day: 9 };
        assert_eq!((date.iso().as_str(), date.short().as_str()), ("2026-03-09", "9 Mar"));
    }
}
