//! The bottom-up router against a plain restatement of its rules, token by token in f64.

mod common;

use common::numbers;
use smore::adapter::{Adapter, Smore};
use smore::config::SmoreConfig;
use smore::spec::SmoreSpec;
use smore_engine::{Cpu, View, ViewMut};

const D_IN: usize = 6;
const D_OUT: usize = 5;
const TOKENS: usize = 40;

fn adapter(layers: &str) -> Smore {
    let json = format!(
        r#"{{"layers": {layers}, "init": "normal", "activation": "tanh", "gate":
            {{"architecture": "bottom_up", "router_width": 4, "router_input_width": 3}}}}"#
    );
    let config: SmoreConfig = serde_json::from_str(&json).unwrap();
    Smore::new(SmoreSpec::new(&config, D_IN, D_OUT).unwrap())
}

/// The parameters by name.
struct Named<'a> {
    smore: &'a Smore,
    values: &'a [f64],
}

impl Named<'_> {
    fn get(&self, name: &str) -> &[f64] {
        let param = self.smore.layout.params.iter().find(|p| p.name == name);
        &self.values[param.unwrap_or_else(|| panic!("no {name}")).range()]
    }

    /// Rows of `x`-long weights times `x`, plus a bias.
    fn affine(weight: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
        let row = |(w, b): (&[f64], &f64)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b;
        weight.chunks(x.len()).zip(bias).map(row).collect()
    }

    /// u of expert `e` in layer `l`.
    fn residual(&self, l: usize, e: usize, x: &[f64]) -> Vec<f64> {
        let (r, d) = (self.smore.spec.layers[l].rank, self.smore.spec.layers[l].width);
        let part = |name: String, len: usize| self.get(&name)[e * len..(e + 1) * len].to_vec();
        let down = Self::affine(
            &part(format!("moe_A.{l}"), r * D_IN),
            &part(format!("moe_A_bias.{l}"), r),
            x,
        );
        Self::affine(&part(format!("moe_B.{l}"), d * r), &part(format!("moe_B_bias.{l}"), d), &down)
    }

    /// The f best of `scores` with their renormalised probabilities.
    fn best(scores: &[f64], f: usize) -> Vec<(usize, f64)> {
        let sum: f64 = scores.iter().map(|s| s.exp()).sum();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let chosen: Vec<(usize, f64)> =
            order[..f].iter().map(|&i| (i, scores[i].exp() / sum)).collect();
        let total: f64 = if f > 1 { chosen.iter().map(|c| c.1).sum() } else { 1.0 };
        chosen.into_iter().map(|(i, p)| (i, p / total)).collect()
    }

    /// The adapter's output for one token.
    fn output(&self, x: &[f64]) -> Vec<f64> {
        let spec = &self.smore.spec;
        let view =
            Self::affine(self.get("moe_downproj_x.weight"), self.get("moe_downproj_x.bias"), x);
        let mut below: Vec<Vec<f64>> = Vec::new();
        for (l, layer) in spec.layers.iter().enumerate() {
            below = (0..layer.parents)
                .map(|parent| {
                    let scores = self.scores(l, parent, &view, &below);
                    let mut sum = vec![0.0; layer.width];
                    for (pair, weight) in Self::best(&scores, layer.fanout) {
                        let (position, expert) = (pair / layer.experts, pair % layer.experts);
                        let mut inner = self.residual(l, expert, x);
                        if l > 0 {
                            let child = &below[parent * layer.fanout + position];
                            let w = self.get(&format!("moe_W.{l}"));
                            let up = Self::affine(w, self.get(&format!("moe_W_bias.{l}")), child);
                            for (i, u) in inner.iter_mut().zip(up) {
                                *i += u;
                            }
                        }
                        for (s, i) in sum.iter_mut().zip(inner) {
                            *s += weight * i.tanh();
                        }
                    }
                    sum
                })
                .collect();
        }
        Self::affine(self.get("moe_W_final"), self.get("moe_W_final_bias"), &below[0])
    }

    /// Scores of everything one parent can choose: experts at the leaves, pairs above.
    fn scores(&self, l: usize, parent: usize, view: &[f64], below: &[Vec<f64>]) -> Vec<f64> {
        let layer = &self.smore.spec.layers[l];
        let (s, width) = (layer.experts, layer.key_width);
        let keys = self.get(&format!("moe_gate.{l}.keys"));
        if l == 0 {
            return Self::affine(&keys[parent * s * width..][..s * width], &vec![0.0; s], view);
        }
        let positions = parent * layer.fanout..(parent + 1) * layer.fanout;
        positions
            .flat_map(|p| {
                let input = [&below[p][..], &keys[p * width..][..width]].concat();
                let net = |part: &str| self.get(&format!("moe_gate.{l}.mlp.{part}"));
                let mut hidden = Self::affine(net("0.weight"), net("0.bias"), &input);
                for h in &mut hidden {
                    *h = h.max(0.0);
                }
                Self::affine(net("2.weight"), net("2.bias"), &hidden)
            })
            .collect()
    }
}

#[test]
fn equals_its_rules() {
    let mut used_twice = false;
    let cases = [
        r#"[{"experts": 4, "fanout": 2, "rank": 2}]"#,
        r#"[{"experts": 4, "fanout": 1, "rank": 2}, {"experts": 3, "fanout": 2, "rank": 1}]"#,
        r#"[{"experts": 3, "fanout": 2, "rank": 1}, {"experts": 4, "fanout": 3, "rank": 2},
            {"experts": 2, "fanout": 2, "rank": 2}]"#,
    ];
    for (layers, seed) in cases.into_iter().flat_map(|c| (1..8).map(move |seed| (c, seed))) {
        let smore = adapter(layers);
        let values = numbers(smore.len(), seed);
        let x = numbers(TOKENS * D_IN, 4);
        let mut y = vec![0.0; TOKENS * D_OUT];
        let saved = smore.forward_with(
            &Cpu::<f64>::new(),
            None,
            None,
            None,
            View::new(&values, values.len()),
            View::new(&x, x.len()),
            ViewMut::new(&mut y, TOKENS * D_OUT),
        );
        let named = Named { smore: &smore, values: &values };
        for (x, y) in x.chunks(D_IN).zip(y.chunks(D_OUT)) {
            for (want, got) in named.output(x).iter().zip(y) {
                assert!((want - got).abs() < 1e-12, "{layers}: {want} against {got}");
            }
        }
        // Positions must be left out and used twice, or half of the rules went unseen.
        let sources = saved.routing.tree.layers.last().unwrap().source.as_ref();
        let fanout = smore.spec.layers.last().unwrap().fanout;
        let twice = |s: &[u32]| s.iter().any(|a| s.iter().filter(|b| *b == a).count() > 1);
        used_twice |= sources.is_some_and(|s| s.chunks(fanout).any(twice));
    }
    assert!(used_twice);
}
