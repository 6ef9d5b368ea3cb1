//! Files of other programs, hostile or mutated at random: each is read whole or refused, and no
//! small file takes much memory. `fuzz/` runs the same readers under a fuzzer.

mod foreign;

use foreign::{READERS, reader};
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which notes what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all memory comes from `System` with the layout that was asked for; the counters are
// cells without destructors, so that using them allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get().saturating_add(layout.size()));
        PEAK.set(PEAK.get().max(HELD.get()));
        // SAFETY: the caller keeps the contract of `alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.set(HELD.get().saturating_sub(layout.size()));
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that reading a file of a few kilobytes may hold at a time.
const MOST: usize = 16 << 20;

/// Reads the bytes and checks the memory it took.
fn read(name: &str, bytes: &[u8]) -> Result<(), String> {
    let before = HELD.get();
    PEAK.set(before);
    let result = (reader(name).read)(bytes);
    let took = PEAK.get().saturating_sub(before);
    assert!(took < MOST, "{name} took {took} bytes for a file of {}", bytes.len());
    if let Err(said) = &result {
        assert!(!said.is_empty());
    }
    result
}

#[track_caller]
fn refused(name: &str, bytes: &[u8], words: &[&str]) {
    let said = read(name, bytes).expect_err("the file was accepted");
    for word in words {
        assert!(said.contains(word), "{said:?} lacks {word:?}");
    }
}

fn good(name: &str) -> Vec<u8> {
    (reader(name).good)().remove(0)
}

#[test]
fn good_files_are_read() {
    for r in &READERS {
        for (i, file) in (r.good)().iter().enumerate() {
            // The weights beside it are S'MoRE's.
            let lora = r.name == "adapter_config" && i == 0;
            match read(r.name, file) {
                Ok(()) => assert!(!lora),
                Err(said) => assert!(lora && said.contains("lora_A"), "{} {i}: {said}", r.name),
            }
        }
    }
}

/// The counter sees what a reader takes: a pickle that fills the stack.
#[test]
fn memory_is_counted() {
    let filled = [b"\x80\x02", &vec![b'N'; 1 << 20][..]].concat();
    let said = std::panic::catch_unwind(|| read("torch_pickle", &filled)).unwrap_err();
    assert!(said.downcast_ref::<String>().unwrap().contains("torch_pickle took"));
}

/// A safetensors file of this header and data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The header of a good file as JSON, and its data.
fn parts(name: &str) -> (serde_json::Value, Vec<u8>) {
    let file = good(name);
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

/// The readers of safetensors, the file's name and a tensor of it.
const SAFETENSORS: [(&str, &str, &str); 2] = [
    (
        "adapter_weights",
        "adapter_model.safetensors",
        "base_model.model.model.layers.0.self_attn.q_proj.moe_B.0",
    ),
    ("model_weights", "model.safetensors", "model.norm.weight"),
];

#[test]
fn truncated_safetensors_are_refused_at_every_byte() {
    for (name, file, _) in SAFETENSORS {
        let whole = good(name);
        for end in 0..whole.len() {
            refused(name, &whole[..end], &[file]);
        }
        refused(name, &[&whole[..], &[0]].concat(), &[file]);
    }
}

#[test]
fn wrong_types_are_refused_by_name() {
    for (name, file, tensor) in SAFETENSORS {
        for dtype in ["I64", "F64", "BOOL", "F8_E4M3", "F128"] {
            let (mut header, mut data) = parts(name);
            header[tensor]["dtype"] = dtype.into();
            // The type fits the bytes: all other tensors keep their places, this one goes last.
            let shape: Vec<u64> = serde_json::from_value(header[tensor]["shape"].clone()).unwrap();
            let width = if dtype.ends_with("64") { 8 } else { 1 };
            let bytes = shape.iter().product::<u64>() as usize * width;
            let start = data.len();
            // Its old place goes to a tensor that fills the gap.
            header["gap"] = header[tensor].clone();
            header["gap"]["dtype"] = "F32".into();
            header[tensor]["data_offsets"] = serde_json::json!([start, start + bytes]);
            data.resize(start + bytes, 0);
            let bytes = safetensors(&header.to_string(), &data);
            let words = if dtype == "F128" { [file, dtype] } else { [tensor, dtype] };
            refused(name, &bytes, &words);
        }
    }
}

#[test]
fn oversized_headers_are_refused() {
    for (name, file, _) in SAFETENSORS {
        let whole = good(name);
        let claim = |length: u64| [&length.to_le_bytes(), &whole[8..]].concat();
        let beyond = whole.len() as u64 - 7;
        for length in [1 << 63, u64::MAX, u64::MAX - 7, 200 << 20, 99 << 20, beyond, 0, 1] {
            refused(name, &claim(length), &[file]);
        }
        // A deep header: a parser that calls itself needs a limit.
        let deep = "[".repeat(100_000);
        refused(name, &safetensors(&deep, &[]), &[file]);
    }
}

#[test]
fn offsets_stay_within_the_data() {
    for (name, file, tensor) in SAFETENSORS {
        let (header, data) = parts(name);
        let [start, end]: [u64; 2] =
            serde_json::from_value(header[tensor]["data_offsets"].clone()).unwrap();
        let length = data.len() as u64;
        for offsets in [
            [0, end - start],
            [start + 4, end + 4],
            [length, length + end - start],
            [end, start],
            [u64::MAX - 3, u64::MAX],
            [start, start],
        ] {
            if offsets == [start, end] {
                continue;
            }
            let mut header = header.clone();
            header[tensor]["data_offsets"] = serde_json::json!(offsets);
            refused(name, &safetensors(&header.to_string(), &data), &[file]);
        }
        for shape in [vec![1u64 << 62], vec![1 << 62, 4], vec![u64::MAX; 8], vec![], vec![0]] {
            let mut header = header.clone();
            header[tensor]["shape"] = serde_json::json!(shape);
            refused(name, &safetensors(&header.to_string(), &data), &[file]);
        }
    }
}

#[test]
fn the_index_names_files_beside_it() {
    let index = String::from_utf8(good("model_index")).unwrap();
    let with = |shard: &str| {
        let shard = serde_json::Value::from(shard).to_string();
        index.replace("\"a.safetensors\"", &shard).into_bytes()
    };
    assert_eq!(read("model_index", &with("a.safetensors")), Ok(()));
    // All of these but the last two are there.
    for trick in [
        "../x.safetensors",
        "./a.safetensors",
        "a.safetensors/",
        "../index/a.safetensors",
        "a.safetensors/.",
        ".",
        "..",
        "",
        "/",
        "/dev/zero",
        "sub/a.safetensors",
    ] {
        refused("model_index", &with(trick), &["model.safetensors.index.json", "plain file name"]);
    }
    refused("model_index", &with("a.safetensors\0"), &["a.safetensors"]);
    refused("model_index", &with("b.safetensors"), &["b.safetensors", "not found"]);
    for map in ["null", "[]", "{\"a\": 1}", "{}"] {
        let index = format!("{{\"weight_map\": {map}}}");
        refused("model_index", index.as_bytes(), &[]);
    }
}

/// Sizes that a few digits can claim.
#[test]
fn claimed_sizes_take_no_memory() {
    let config = String::from_utf8(good("adapter_config")).unwrap();
    for rank in ["1000000000", "18446744073709551615", "4294967296"] {
        let config = config.replace("\"r\": 2", &format!("\"r\": {rank}"));
        refused("adapter_config", config.as_bytes(), &["adapter"]);
    }
    let mut config: serde_json::Value =
        serde_json::from_slice(&(reader("adapter_config").good)()[1]).unwrap();
    config["expert_dims"] = serde_json::json!([20_000, 20_000]);
    let words = ["adapter_model.safetensors", "too few", "adapter_config.json"];
    refused("adapter_config", config.to_string().as_bytes(), &words);

    let config = String::from_utf8(good("model_config")).unwrap();
    for size in ["1000000", "4000000000"] {
        let config = config.replace("hidden_layers\": 1", &format!("hidden_layers\": {size}"));
        refused("model_config", config.as_bytes(), &["num_hidden_layers", size]);
    }
}

/// A change to a file.
#[derive(Clone, Debug)]
enum Edit {
    Set(usize, u8),
    Flip(usize, u8),
    Cut(usize, usize),
    Insert(usize, u8),
    End(usize),
    /// The length at the front, where a safetensors file has it.
    Length(u64),
    /// Digits in place of a digit.
    Number(usize, u64),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<usize>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, b)| Edit::Set(at, b)),
        (at(), 0..8u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (at(), 1..20usize).prop_map(|(at, n)| Edit::Cut(at, n)),
        (at(), any::<u8>()).prop_map(|(at, b)| Edit::Insert(at, b)),
        at().prop_map(Edit::End),
        prop_oneof![0..3000u64, any::<u64>()].prop_map(Edit::Length),
        (at(), prop_oneof![0..20u64, any::<u64>()]).prop_map(|(at, n)| Edit::Number(at, n)),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    let n = bytes.len().max(1);
    match *edit {
        Edit::Length(length) if bytes.len() >= 8 => {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        Edit::Insert(at, byte) => bytes.insert(at % n, byte),
        Edit::End(at) => bytes.truncate(at % n),
        Edit::Cut(at, count) => drop(bytes.drain(at % n..(at % n + count).min(bytes.len()))),
        Edit::Number(at, number) => {
            let digits: Vec<usize> =
                (0..bytes.len()).filter(|&i| bytes[i].is_ascii_digit()).collect();
            if !digits.is_empty() {
                let at = digits[at % digits.len()];
                bytes.splice(at..=at, number.to_string().into_bytes());
            }
        }
        Edit::Set(at, byte) if !bytes.is_empty() => bytes[at % n] = byte,
        Edit::Flip(at, bit) if !bytes.is_empty() => bytes[at % n] ^= 1 << bit,
        _ => {}
    }
}

fn mutated(name: &str, seed: usize, edits: &[Edit]) {
    thread_local! {
        static GOOD: Vec<Vec<Vec<u8>>> = READERS.iter().map(|r| (r.good)()).collect();
    }
    let at = READERS.iter().position(|r| r.name == name).unwrap();
    let mut bytes = GOOD.with(|good| good[at][seed % good[at].len()].clone());
    for edit in edits {
        apply(&mut bytes, edit);
    }
    drop(read(name, &bytes));
}

/// One test per reader, so that a failure is named and they run side by side.
macro_rules! mutations {
    ($($name:ident)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 800, ..ProptestConfig::default() })]
            $(
                #[test]
                fn $name(seed in 0..6usize, edits in prop::collection::vec(edit(), 1..4)) {
                    mutated(stringify!($name), seed, &edits);
                }
            )*
        }
    };
}

mutations! {
    torch_file torch_pickle adapter_weights adapter_config model_weights model_index model_config
    run_config chat_template
}
