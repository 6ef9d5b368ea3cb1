//! What is known about an adapter, as tables.

use super::{Base, Smore};
use crate::table::{self, count};
use serde_json::{Value, json};
use smore::counting::flexibility::{self, Choice, Flexibility, Formula};
use smore::counting::{
    Multiplications, Parameters, active_parameters, parameter_overhead, propagation_overhead,
};

impl Smore<'_> {
    pub(super) fn print(&self, base: Option<&Base>) {
        let c = self.config;
        println!(
            "S'MoRE, {} layer{}, structure {}{}; gate {} ({}), activation {} ({}), start {}\n",
            self.shape.depth(),
            if self.shape.depth() == 1 { "" } else { "s" },
            word(json!(c.structure)),
            if c.shared_pool { ", shared pool" } else { "" },
            word(json!(c.gate.kind)),
            word(json!(c.gate.architecture)),
            word(json!(c.activation)),
            word(json!(c.activation_position)),
            word(json!(c.init)),
        );
        self.print_layers();
        self.print_flexibility();
        if let Some(base) = base {
            self.print_maps();
            self.print_parameters(base);
            self.print_cost();
        } else {
            let names: Vec<_> = self.targets.iter().map(|t| t.proj.name()).collect();
            println!("\n  on {}", names.join(", "));
        }
    }

    fn print_layers(&self) {
        let depth = self.shape.depth();
        let row = |l: usize| {
            let layer = &self.shape.layers[l];
            let place = match l {
                _ if depth == 1 => "0".into(),
                0 => "0 (leaves)".into(),
                _ if l == depth - 1 => format!("{l} (top)"),
                _ => l.to_string(),
            };
            let choice = Choice { experts: layer.experts, fanout: layer.fanout };
            vec![
                place,
                count(layer.experts),
                count(layer.fanout),
                count(layer.rank),
                format!("{} \u{2192} {}", count(layer.width_below), count(layer.width)),
                count(layer.nodes),
                self.router_input(l).map_or_else(|| "\u{2013}".into(), count),
                big(&choice.count()),
            ]
        };
        let header = [
            "layer",
            "experts",
            "fanout",
            "rank",
            "width",
            "active nodes",
            "router input",
            "sets of children",
        ];
        table::print(&header, &(0..depth).map(row).collect::<Vec<_>>());
    }

    fn print_flexibility(&self) {
        let own = flexibility::of(&self.shape);
        let row = |name: String, gamma: &Flexibility| vec![name, big(gamma), decimal(gamma.ln)];
        let mut rows = Vec::new();
        if let Some((formula, gamma)) = &own {
            rows.push(row(format!("this adapter: {}", formula.name()), gamma));
        } else {
            rows.push(vec![
                "this adapter: no formula is known".into(),
                String::new(),
                String::new(),
            ]);
        }
        if self.shape.depth() > 1 {
            let own = own.map(|(formula, _)| formula);
            let tree = if self.shape.shared_pool { Formula::SmoreSharp } else { Formula::Smore };
            for formula in [tree, Formula::SmoreStar, Formula::MomorBound] {
                if Some(formula) != own {
                    rows.push(row(formula.name().into(), &formula.count(&self.choices())));
                }
            }
            let flat = self.flat();
            let name = format!("flat mixture, {} of {} experts", flat.fanout, flat.experts);
            rows.push(row(name, &flexibility::flat_mixture(flat)));
        }
        println!();
        table::print(&["structural flexibility", "distinct outputs", "ln"], &rows);
    }

    fn print_maps(&self) {
        let mut rows: Vec<_> = Vec::new();
        for (target, spec) in self.targets.iter().zip(&self.maps) {
            let (one, compute) = (Parameters::of(spec).total(), Multiplications::of(spec));
            rows.push(vec![
                target.proj.name().into(),
                format!("{} \u{2192} {}", count(spec.d_in), count(spec.d_out)),
                count(target.blocks),
                count(one),
                count(one * target.blocks),
                count(compute.total()),
                format!("+{:.1}%", 100.0 * parameter_overhead(spec)),
                format!("+{:.1}%", 100.0 * propagation_overhead(spec)),
            ]);
        }
        println!();
        let header = [
            "on",
            "width",
            "blocks",
            "parameters",
            "in all blocks",
            "mult. per token",
            "B, W",
            "propagation",
        ];
        table::print(&header, &rows);
        println!(
            "  B, W: their parameters on top of LoRA of rank {}'s (Table 1);",
            self.shape.root_width()
        );
        println!("  propagation: its multiplications on top of that LoRA's (Table 6)");
    }

    fn print_parameters(&self, base: &Base) {
        let total = self.total(Parameters::of);
        let share = |n: usize| format!("{:.2}%", 100.0 * n as f64 / total.total() as f64);
        let mut rows: Vec<_> = total
            .parts()
            .into_iter()
            .filter(|(_, n)| *n > 0)
            .map(|(name, n)| vec![name.into(), count(n), share(n)])
            .collect();
        rows.push(vec!["all".into(), count(total.total()), share(total.total())]);
        let active = self.total(active_parameters);
        rows.push(vec!["at work on a token, router aside".into(), count(active), share(active)]);
        println!();
        table::print(&["trained parameters", "number", "share"], &rows);
        if let Some(all) = base.parameters() {
            let base_share = 100.0 * total.total() as f64 / all as f64;
            println!("  {base_share:.2}% of the base's {}", count(all));
        }
    }

    fn print_cost(&self) {
        let total = self.total(Parameters::of).total();
        let compute = self.total(Multiplications::of);
        let authors = self.total(|m| self.author_stats(m));
        let [equal_rank, equal_size] = self.loras();
        let against = |n: usize| format!("{:.3}", n as f64 / total as f64);
        let lora = |name: &str, (rank, parameters): (usize, usize)| {
            vec![
                format!("LoRA of {name}, rank {}", count(rank)),
                count(parameters),
                against(parameters),
                count(parameters),
            ]
        };
        println!();
        table::print(
            &["compared", "parameters", "ratio", "mult. per token"],
            &[
                vec!["this adapter".into(), count(total), against(total), count(compute.total())],
                lora("equal width", equal_rank),
                lora("equal size", equal_size),
            ],
        );
        println!();
        let row = |name: &str, n: usize| vec![name.to_owned(), count(n)];
        table::print(
            &["multiplications per token", "number"],
            &[
                row("experts, transforms and projection (App. C.1)", compute.paper()),
                row("routers, every parent's query", compute.router),
                row("authors' statistics: expert_flops", authors.expert_flops),
                row("authors' statistics: gate_flops", authors.gate_flops),
            ],
        );
    }
}

/// A setting as it is written in a configuration.
fn word(setting: Value) -> String {
    setting.as_str().unwrap_or_default().to_owned()
}

/// A number in full while that is short, else as a power of ten.
fn big(gamma: &Flexibility) -> String {
    let digits = gamma.exact.as_ref().filter(|_| gamma.log10() < 18.0).map(ToString::to_string);
    if let Some(n) = digits.and_then(|d| d.parse().ok()) {
        return count(n);
    }
    format!("10^{}", decimal(gamma.log10()))
}

fn decimal(x: f64) -> String {
    if x < 1e9 { format!("{x:.2}") } else { format!("{x:.3e}") }
}
