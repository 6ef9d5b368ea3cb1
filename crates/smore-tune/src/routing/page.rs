//! The page of a run's routing: heat maps of every place, flows from parents to children, and a
//! slider over the steps.

use super::summary::LayerUsage;
use super::table::{Split, Window};
use crate::report::interactive;
use maud::html;
use serde_json::{Value, json};

const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");

/// Windows of one split that a page shows; of more, an even choice.
const SHOWN: usize = 120;

/// Windows as one HTML file that needs no network. Shares are rounded to a thousandth.
pub fn page(windows: &[Window], title: &str) -> String {
    let data = data(windows);
    let body = html! {
        section {
            label for="split" { "Counted in " }
            select id="split" {}
            p id="when" {}
            input type="range" id="step" min="0" value="0" aria-label="training step";
        }
        section {
            h2 { "Places" }
            p.about {
                "Share of each expert in every layer, leaves first. Evenness: 1 is even use, 0 a \
                 single expert. Choose a place to see it over time."
            }
            div.scroll { table.heat id="map" {} }
        }
        section {
            h2 id="of" {}
            p.about id="facts" {}
            div.scroll id="time" {}
            div.scroll id="flow" {}
        }
    };
    let about = "How the routers use their experts";
    interactive(title, about, STYLE, &body, &data, SCRIPT)
}

fn data(windows: &[Window]) -> Value {
    let splits = [Split::Train, Split::HeldOut, Split::Reference, Split::Generation];
    let splits = splits.into_iter().filter_map(|split| {
        let all: Vec<&Window> = windows.iter().filter(|w| w.split == split).collect();
        let first = all.first()?;
        let layers: Vec<Value> = first
            .layers
            .iter()
            .map(|(usage, counts)| {
                json!({"place": usage.path, "layer": usage.layer, "experts": counts.experts,
                    "parents": counts.parents})
            })
            .collect();
        let even = |i: usize| all[i * (all.len() - 1) / (SHOWN.min(all.len()) - 1).max(1)];
        let windows: Vec<Value> = (0..SHOWN.min(all.len())).map(even).map(window).collect();
        Some(json!({"name": split.name(), "of": all.len(), "layers": layers, "windows": windows}))
    });
    Value::Array(splits.collect())
}

fn window(window: &Window) -> Value {
    let thousandth = |x: f64| (x * 1000.0).round() / 1000.0;
    let layers: Vec<Value> = window
        .layers
        .iter()
        .map(|(usage, counts)| {
            let total = counts.count.iter().sum::<u64>().max(1) as f64;
            let flow = |n: &u64| thousandth(*n as f64 / total);
            let flows: Vec<f64> =
                if counts.parents > 0 { counts.count.iter().map(flow).collect() } else { vec![] };
            let LayerUsage { share, weight, parent, trees, .. } = usage;
            let rounded = |all: &[f64]| all.iter().map(|&x| thousandth(x)).collect::<Vec<_>>();
            json!({"share": rounded(share), "weight": rounded(weight), "flow": flows,
                "even": thousandth(usage.evenness()), "cv": thousandth(usage.cv()),
                "parent": parent.map(|p| [thousandth(p.information), p.bias]), "trees": trees.round()})
        })
        .collect();
    let tokens = window.layers.first().map_or(0, |(usage, _)| usage.tokens);
    json!({"first": window.steps.0, "last": window.steps.1, "tokens": tokens, "layers": layers})
}
