//! An expert that is known to carry a fact is the one that `ablate` names.

mod adapted;

use adapted::{adapter, base};
use smore_engine::Cpu;
use smore_tune::checkpoint::LoadedAdapter;
use smore_tune::model::folder::ModelFolder;
use smore_tune::model::{Batch, Model};
use smore_tune::trace::{ablate, removals};

const SECTION: &str = r#"{"kind": "smore", "targets": ["up_proj", "down_proj"],
    "layers": [{"experts": 4, "fanout": 2, "rank": 2}, {"experts": 4, "fanout": 2, "rank": 2}],
    "gate": {"router_width": 8, "router_input_width": 8}}"#;
const PROMPT: [u32; 9] = [3, 17, 44, 8, 61, 30, 5, 77, 12];

fn model(values: &[f32]) -> Model<Cpu<f32>> {
    let folder = ModelFolder::open(&base("qwen2")).unwrap();
    let LoadedAdapter { adapters, .. } = adapter(&folder, SECTION);
    Model::new(Cpu::new(), &folder, adapters, values, 32)
}

fn likeliest(model: &Model<Cpu<f32>>) -> u32 {
    let logits = model.extend(&PROMPT, &mut model.cache());
    (0..logits.len() as u32)
        .max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]))
        .unwrap()
}

#[test]
fn the_expert_that_carries_a_fact_is_ranked_first() {
    let folder = ModelFolder::open(&base("qwen2")).unwrap();
    let LoadedAdapter { adapters, mut values, .. } = adapter(&folder, SECTION);
    // All experts do a little everywhere, ..
    for value in &mut values {
        *value *= 0.2;
    }
    let plain = model(&values);
    let before = likeliest(&plain);
    let place = adapters.slots.last().unwrap();
    let mut batch = Batch::default();
    batch.push(&PROMPT, &[false; 9]);
    let routing = plain.routing(&batch);
    let top = &routing.last().unwrap().as_ref().unwrap().tree.layers[1];
    let fanout = top.expert_idx.len() / PROMPT.len();
    let last = &top.expert_idx[(PROMPT.len() - 1) * fanout..];
    for &expert in last {
        // .. and one of those that act at the last token moves it far in one direction.
        let mut values = values.clone();
        let param = |name: &str| place.params().iter().find(|p| p.name == name).unwrap();
        let (bias, out) = (param("moe_B_bias.1"), param("moe_W_final"));
        let width = bias.shape[1];
        let start = place.range.start;
        values[start + bias.offset + usize::from(expert) * width] = 3.0;
        let taught = [4.0, -4.0].into_iter().find_map(|size| {
            for row in 0..out.shape[0] {
                let direction = ((row * 29 + usize::from(expert) * 5) % 13) as f32 - 6.0;
                values[start + out.offset + row * width] = size * direction;
            }
            let taught = model(&values);
            (likeliest(&taught) != before).then_some(taught)
        });
        let taught = taught.expect("the expert changes nothing");
        let fact = likeliest(&taught);
        let mut batch = Batch::default();
        let ids: Vec<u32> = PROMPT.iter().copied().chain([fact]).collect();
        batch.push(&ids, &[[false; 9].as_slice(), &[true]].concat());
        let all = removals(&taught, &batch);
        assert!(all.len() > 20, "{}", all.len());
        let (whole, effects) = ablate(&taught, &batch, all, |_| {});
        let first = &effects[0];
        assert_eq!((&first.place, first.layer, &first.path[..]), (&place.path(), 1, &[expert][..]));
        assert!(first.change < -0.5, "{first:?}");
        assert!(effects[1].change > first.change, "{:?}", &effects[..2]);
        // Without it the model answers as one that was never taught.
        let untaught: f64 = -plain.losses(&batch).iter().sum::<f64>();
        assert!((whole + first.change - untaught).abs() < 0.3 * -first.change, "{untaught}");
    }
}
