//! The page of a trace: hovering a token shows its tree, choosing an expert shows its tokens.

use super::{Layer, Trace};
use crate::report::interactive;
use maud::html;
use serde_json::{Value, json};

const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");

/// A trace as one HTML file that needs no network. Numbers are rounded to a 255th of 1 (weights)
/// or of the place's largest (contributions, by their root); exact ones are in the JSONL.
pub fn page(trace: &Trace, title: &str) -> String {
    let main = html! {
        section {
            label for="place" { "Place " }
            select id="place" {}
            div id="experts" {}
            div id="text" {}
        }
        section {
            h2 id="of" {}
            div.scroll id="tree" {}
            p id="note" {}
        }
    };
    let subtitle = "Point at a token, or touch it, to see which experts act on it. Choose an expert to \
                    see its tokens: the stronger the colour, the larger its weight.";
    interactive(title, subtitle, STYLE, &main, &data(trace), SCRIPT)
}

fn data(trace: &Trace) -> Value {
    let n = trace.tokens.len();
    let place = |place: &super::Place| {
        let layers: Vec<Value> = place.layers.iter().map(|l| layer(l, n)).collect();
        json!({"path": place.path, "layers": layers})
    };
    let tokens: Vec<&str> = trace.tokens.iter().map(|t| t.text.as_str()).collect();
    json!({"tokens": tokens, "places": trace.places.iter().map(place).collect::<Vec<_>>()})
}

fn layer(layer: &Layer, n: usize) -> Value {
    let share = |x: f64| (x.clamp(0.0, 1.0) * 255.0).round() as u8;
    let experts: Vec<u8> = layer.experts.iter().flat_map(|e| e.to_le_bytes()).collect();
    let weights: Vec<u8> = layer.weights.iter().map(|&w| share(f64::from(w))).collect();
    let most = layer.contributions.iter().flatten().copied().fold(0.0, f64::max);
    let root = |&c: &f64| share((c / most.max(f64::MIN_POSITIVE)).sqrt());
    let contributions = layer.contributions.as_ref();
    json!({
        "nodes": layer.experts.len() / n.max(1),
        "experts": base64(&experts),
        "weights": base64(&weights),
        "most": most,
        "contributions":
            contributions.map(|c| base64(&c.iter().map(root).collect::<Vec<_>>())),
    })
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, &b| word << 8 | u32::from(b));
        let word = word << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i)) as usize & 63];
            text.push(if i > chunk.len() { '=' } else { char::from(digit) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), text);
        }
    }

    /// 500 tokens at the 48 FFN maps of a model of 16 blocks.
    #[test]
    fn a_trace_of_500_tokens_is_small_and_escaped() {
        let n = 500;
        let layer = |nodes: usize| Layer {
            experts: (0..n * nodes).map(|i| (i % 4) as u16).collect(),
            weights: vec![0.5; n * nodes],
            contributions: Some((0..n * nodes).map(|i| i as f64).collect()),
        };
        let place = |i: usize| super::super::Place {
            path: format!("model.layers.{i}.mlp.gate_proj"),
            layers: vec![layer(8), layer(4), layer(2)],
        };
        let text = "</script><script>".to_owned();
        let tokens = vec![super::super::Token { id: 0, text }; n];
        let html = page(&Trace { tokens, places: (0..48).map(place).collect() }, "a <b>");
        assert!(html.len() < 5_000_000, "{}", html.len());
        assert_eq!(html.matches("</script>").count(), 2);
        assert!(html.contains("a &lt;b&gt;") && !html.contains("http"));
    }
}
