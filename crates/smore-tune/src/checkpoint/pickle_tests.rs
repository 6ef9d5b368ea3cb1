use super::*;
use proptest::prelude::*;
use std::io::Cursor;

/// Writes pickles, one instruction per call.
#[derive(Clone)]
struct Pickle(Vec<u8>);

impl Pickle {
    fn new() -> Self {
        Self(vec![0x80, 2])
    }

    fn op(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn global(self, module: &str, name: &str) -> Self {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    fn text(self, text: &str) -> Self {
        self.op(b"X").op(&(text.len() as u32).to_le_bytes()).op(text.as_bytes())
    }

    fn int(self, n: i64) -> Self {
        self.op(&[0x8a, 8]).op(&n.to_le_bytes())
    }

    fn ints(self, numbers: &[i64]) -> Self {
        numbers.iter().fold(self.op(b"("), |p, &n| p.int(n)).op(b"t")
    }

    fn storage(self, kind: &str, key: &str, stored: i64) -> Self {
        let head = self.op(b"(").text("storage").global("torch", kind);
        head.text(key).text("cpu").int(stored).op(b"tQ")
    }

    fn tensor(self, s: &Storage, offset: i64, shape: &[i64], strides: &[i64]) -> Self {
        let head = self.global("torch._utils", "_rebuild_tensor_v2").op(b"(");
        let head = head.storage(s.kind, s.key, s.stored).int(offset).ints(shape).ints(strides);
        head.op(b"\x89").global("collections", "OrderedDict").op(b")RtR")
    }

    /// The end of a dict that `dict` began.
    fn end(self) -> Vec<u8> {
        self.op(b"u.").0
    }
}

/// The begin of a dict.
fn dict() -> Pickle {
    Pickle::new().op(b"}(")
}

#[derive(Clone, Copy)]
struct Storage {
    kind: &'static str,
    key: &'static str,
    stored: i64,
}

/// Six numbers of f32.
const SIX: Storage = Storage { kind: "FloatStorage", key: "0", stored: 6 };

fn six() -> Vec<u8> {
    (0..6u8).flat_map(|x| f32::from(x).to_le_bytes()).collect()
}

fn crc32(bytes: &[u8]) -> u32 {
    let byte = |crc: u32, &b: &u8| {
        (0..8).fold(crc ^ u32::from(b), |c, _| (c >> 1) ^ (0xedb8_8320 & (c & 1).wrapping_neg()))
    };
    !bytes.iter().fold(!0, byte)
}

/// A zip archive as PyTorch writes it: stored, sizes behind each entry, each entry's bytes at a
/// multiple of 64 by means of an extra field.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (vec![], vec![]);
    for (name, data) in entries {
        let start = file.len() as u32;
        let before = file.len() + 30 + name.len() + 4;
        let padding = before.next_multiple_of(64) - before;
        let sizes = [crc32(data), data.len() as u32, data.len() as u32];
        let sizes: Vec<u8> = sizes.iter().flat_map(|n| n.to_le_bytes()).collect();
        let common = |version: &[u8], sizes: &[u8], extra: u16| {
            let rest = [&[0; 4], sizes, &(name.len() as u16).to_le_bytes(), &extra.to_le_bytes()];
            [version, &[8, 8, 0, 0], &rest.concat()].concat()
        };
        file.extend(b"PK\x03\x04");
        file.extend(common(&[0; 2], &[0; 12], 4 + padding as u16));
        file.extend(name.as_bytes());
        file.extend([b'F', b'B']);
        file.extend((padding as u16).to_le_bytes());
        file.extend(vec![b'Z'; padding]);
        file.extend(*data);
        file.extend(b"PK\x07\x08");
        file.extend(&sizes);
        directory.extend(b"PK\x01\x02");
        directory.extend(common(&[0; 4], &sizes, 0));
        directory.extend([0; 10]);
        directory.extend(start.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (at, n) = (file.len() as u32, (entries.len() as u16).to_le_bytes());
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([n, n].concat());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(at.to_le_bytes());
    file.extend([0, 0]);
    file
}

fn archive(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let names: Vec<String> = storages.iter().map(|(key, _)| format!("a/data/{key}")).collect();
    let mut entries: Vec<(&str, &[u8])> = vec![("a/data.pkl", pickle), ("a/byteorder", b"little")];
    entries.extend(names.iter().map(String::as_str).zip(storages.iter().map(|(_, data)| *data)));
    entries.push(("a/version", b"3\n"));
    zip(&entries)
}

fn read_bytes(bytes: &[u8]) -> Reading<BTreeMap<String, Tensor>> {
    read_torch(Cursor::new(bytes))
}

/// What is said of a pickle beside one storage of six numbers.
fn refusal(pickle: &[u8]) -> String {
    read_bytes(&archive(pickle, &[("0", &six())])).expect_err("the pickle was accepted")
}

fn one(s: Storage, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    dict().text("x").tensor(&s, offset, shape, strides).end()
}

#[track_caller]
fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{said:?} lacks {word:?}");
    }
}

fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor { shape: shape.to_vec(), values: values.to_vec() }
}

/// What Python's pickle and zipfile wrote, see `make.py` beside the files.
const RECORDED: [&[u8]; 3] = [
    include_bytes!("../../tests/fixtures/torch/protocol2.bin"),
    include_bytes!("../../tests/fixtures/torch/protocol4.bin"),
    include_bytes!("../../tests/fixtures/torch/protocol5.bin"),
];

#[test]
fn reads_what_python_wrote() {
    for bytes in RECORDED {
        let read = read_bytes(bytes).unwrap();
        let expected = [
            ("brain", tensor(&[3], &[0.25, -3.0, 7.0])),
            ("column", tensor(&[2], &[2.0, 5.0])),
            ("empty", tensor(&[0, 3], &[])),
            ("half", tensor(&[2, 1], &[1.5, -2.0])),
            ("number", tensor(&[], &[0.1])),
            ("turned", tensor(&[3, 2], &[0.5, 3.0, -1.0, 1e-3, 2.0, 5.0])),
            ("whole", tensor(&[2, 3], &[0.5, -1.0, 2.0, 3.0, 1e-3, 5.0])),
        ];
        assert_eq!(read, expected.map(|(name, t)| (name.to_owned(), t)).into());
    }
}

#[test]
fn reads_what_is_laid_out_as_pytorch_does() {
    let pickle = one(SIX, 1, &[2, 2], &[1, 3]);
    let read = read_bytes(&archive(&pickle, &[("0", &six())])).unwrap();
    assert_eq!(read["x"], tensor(&[2, 2], &[1.0, 4.0, 2.0, 5.0]));
    // PyTorch before 2.1 says no byte order.
    let old = zip(&[("b/data.pkl", &pickle), ("b/data/0", &six()), ("b/version", b"3\n")]);
    assert_eq!(read_bytes(&old).unwrap(), read);
}

#[test]
fn files_are_named_and_absent_ones_missed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_model.bin");
    assert!(matches!(read_torch_file(&path), Err(Error::Missing { .. })));
    let pickle = Pickle::new().global("os", "system").text("id").op(b"\x85R.").0;
    std::fs::write(&path, archive(&pickle, &[])).unwrap();
    let error = read_torch_file(&path).unwrap_err();
    let words = ["adapter_model.bin: ", "wants to call `os.system`", "nothing was executed"];
    says(&error.to_string(), &words);
    assert_eq!(error.exit_code(), 2);
    std::fs::write(&path, RECORDED[0]).unwrap();
    assert_eq!(read_torch_file(&path).unwrap().len(), 7);
    says(&read_torch_file(dir.path()).unwrap_err().to_string(), &["cannot be read"]);
}

#[test]
fn nothing_is_called() {
    let marker = std::env::temp_dir().join(format!("smore-pickle-{}", std::process::id()));
    let command = format!("touch {}", marker.display());
    let start = Pickle::new();
    let cases = [
        (start.clone().global("os", "system").text(&command).op(b"\x85R."), "`os.system`"),
        (start.clone().global("posix", "system").text(&command).op(b"\x85R."), "`posix.system`"),
        (start.clone().text("builtins").text("eval").op(b"\x93"), "`builtins.eval`"),
        (start.clone().global("torch._utils", "_rebuild_qtensor"), "_rebuild_qtensor"),
        (start.clone().global("torch", "load"), "`torch.load`"),
        (start.clone().op(b"(ios\nsystem\n."), "`os.system`"),
        (start.clone().op(b"(icollections\nOrderedDict\n."), "makes an object"),
        (start.clone().global("collections", "OrderedDict").op(b")\x81."), "object of a class"),
        (
            start.clone().op(b"(").global("collections", "OrderedDict").op(b"o."),
            "object of a class",
        ),
        (start.clone().op(b"N)R."), "not a known name"),
        (start.clone().global("torch", "FloatStorage").op(b")R."), "makes a storage by a call"),
        (start.clone().global("collections", "OrderedDict").int(1).op(b"\x85R."), "OrderedDict"),
        (start.clone().op(b"\x82\x01."), "registered extension"),
        (start.clone().op(b"P0\n."), "persistent object"),
        (start.clone().op(b"]."), "builds a list"),
        (start.clone().op(b"\x97."), "buffer"),
        (start.clone().int(1).text("a").op(b"\x93"), "other than text"),
        (start.global("a\x1b[2J", "b"), "\\u{1b}"),
    ];
    for (pickle, word) in cases {
        says(&refusal(&pickle.0), &["data.pkl, byte ", word]);
    }
    assert!(!marker.exists());
}

#[test]
fn tensors_stay_within_their_storage() {
    for (offset, shape, strides) in [
        (0, &[7][..], &[1][..]),
        (1, &[2, 3], &[3, 1]),
        (6, &[], &[]),
        (0, &[2, 2], &[1, 5]),
        (i64::MAX, &[1], &[1]),
    ] {
        says(&refusal(&one(SIX, offset, shape, strides)), &["`x`", "storage of 6"]);
    }
    says(&refusal(&one(SIX, -1, &[1], &[1])), &["offset", "-1"]);
    says(&refusal(&one(SIX, 5, &[2], &[-1])), &["strides", "-1"]);
    says(&refusal(&one(SIX, 0, &[-2], &[1])), &["shape", "-2"]);
    says(&refusal(&one(SIX, 0, &[2, 3], &[1])), &["other dimensions"]);
    says(&refusal(&one(SIX, 0, &[1; 17], &[1; 17])), &["17 dimensions"]);
}

#[test]
fn absurd_sizes_take_no_memory() {
    let huge = Storage { stored: 1 << 62, ..SIX };
    for (shape, strides) in
        [(&[1 << 62][..], &[1][..]), (&[1 << 62, 1 << 62], &[0, 0]), (&[2, 2], &[1 << 62, 1 << 62])]
    {
        says(&refusal(&one(huge, 0, shape, strides)), &["`x`"]);
    }
    says(&refusal(&one(huge, 0, &[6], &[1])), &["24 bytes", "4611686018427387904 values"]);
    // A few numbers repeated by a stride of zero.
    says(&refusal(&one(SIX, 0, &[1 << 40], &[0])), &["more than 8 times"]);
    let small = read_bytes(&archive(&one(SIX, 5, &[1000], &[0]), &[("0", &six())])).unwrap();
    assert_eq!(small["x"], tensor(&[1000], &[5.0; 1000]));
    let many = (0..100).fold(dict(), |p, i| p.text(&i.to_string()).tensor(&SIX, 0, &[5000], &[0]));
    says(&refusal(&many.end()), &["more than 8 times"]);
    let number = Pickle::new().op(&[0x8a, 200]).op(&[1; 200]).0;
    says(&refusal(&number), &["200 bytes"]);
    says(&refusal(&Pickle::new().op(b"X\xff\xff\xff\xff").0), &["ends within"]);
    says(&refusal(&Pickle::new().op(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff").0), &["ends within"]);
    says(&refusal(&Pickle::new().op(b"\x95\xff\xff\xff\xff\xff\xff\xff\xff").0), &["frame"]);
}

#[test]
fn storages_are_there_and_of_the_length_they_say() {
    let missing = one(Storage { key: "1", ..SIX }, 0, &[6], &[1]);
    says(&refusal(&missing), &["`x`", "no entry `data/1`"]);
    let short = one(Storage { stored: 5, ..SIX }, 0, &[5], &[1]);
    says(&refusal(&short), &["`x`", "24 bytes", "expected 5 values of 4"]);
    for key in ["../data.pkl", "0/../0", "", "/0", "0\0", "٣", "000000000000000000000"] {
        let pickle = dict().text("x").storage("FloatStorage", key, 6).end();
        says(&refusal(&pickle), &["a storage's key is"]);
    }
    // An entry of such a name is not asked for either.
    let trick = [("a/data/../../x", &six()[..]), ("a/version", b"3")];
    let pickle = one(SIX, 0, &[6], &[1]);
    let file = zip(&[&[("a/data.pkl", &pickle[..])][..], &trick].concat());
    says(&read_bytes(&file).unwrap_err(), &["no entry `data/0`"]);
}

#[test]
fn other_types_are_named() {
    for kind in ["LongStorage", "BoolStorage", "ComplexFloatStorage"] {
        let pickle = one(Storage { kind, ..SIX }, 0, &[3], &[1]);
        says(&refusal(&pickle), &["`x`", kind, "expected f32"]);
    }
    let eight = dict().text("x").global("torch._utils", "_rebuild_tensor_v3").end();
    says(&refusal(&eight), &["_rebuild_tensor_v3"]);
}

#[test]
fn only_a_flat_dict_of_tensors_is_one() {
    let nested = dict().text("state_dict").op(b"}").text("epoch").int(3).end();
    says(&refusal(&nested), &["`state_dict`", "is a dict itself", "torch.save(checkpoint["]);
    says(&refusal(&dict().text("epoch").int(3).end()), &["`epoch`", "a number"]);
    says(&refusal(&dict().text("name").text("a").end()), &["`name`", "a text"]);
    says(&refusal(&dict().int(1).tensor(&SIX, 0, &[6], &[1]).end()), &["key is a number"]);
    let alone = Pickle::new().tensor(&SIX, 0, &[6], &[1]).op(b".").0;
    says(&refusal(&alone), &["holds a single tensor"]);
    let twice = dict().text("x").tensor(&SIX, 0, &[6], &[1]);
    let twice = twice.text("x").tensor(&SIX, 0, &[6], &[1]).end();
    says(&refusal(&twice), &["`x` is there twice"]);
    says(&refusal(&dict().text("x").end()), &["key without a value"]);
    assert_eq!(read_bytes(&archive(&dict().end(), &[])), Ok(BTreeMap::new()));
}

#[test]
fn what_a_tensor_carries_is_refused() {
    let start = dict().text("x").global("torch._utils", "_rebuild_tensor_v2").op(b"(");
    let start = start.storage("FloatStorage", "0", 6).int(0).ints(&[6]).ints(&[1]).op(b"\x89");
    let hooks = start.clone().op(b"}").int(1).int(2).op(b"stR").end();
    says(&refusal(&hooks), &["hooks"]);
    let negated = start.clone().op(b"}}").text("neg").op(b"\x88stR").end();
    says(&refusal(&negated), &["metadata"]);
    let plain = start.op(b"}}tR").end();
    assert!(read_bytes(&archive(&plain, &[("0", &six())])).is_ok());
    let parameter = dict().text("x").global("torch._utils", "_rebuild_parameter");
    let parameter = parameter.op(b"(").int(1).op(b"\x88}tR").end();
    says(&refusal(&parameter), &["parameter", "not a tensor"]);
    let state = Pickle::new().int(1).op(b"}b.").0;
    says(&refusal(&state), &["attributes"]);
}

#[test]
fn nesting_and_sharing_cost_what_they_say() {
    // Deeper than any stack is for code that calls itself.
    let deep = Pickle::new().op(b")").op(&vec![0x85; 1 << 20]).op(b".").0;
    says(&refusal(&deep), &["holds a tuple"]);
    // 2^1000 leaves, if written out.
    let bomb = (0..1000).fold(Pickle::new().op(b")"), |p, _| p.op(b"q\0h\0\x86")).op(b".").0;
    says(&refusal(&bomb), &["holds a tuple"]);
    let marks = Pickle::new().op(&vec![b'('; 3 << 20]).0;
    says(&refusal(&marks), &["more than 2097152 values"]);
    let nones = Pickle::new().op(&vec![b'N'; 3 << 20]).0;
    says(&refusal(&nones), &["more than 2097152 values"]);
    // A dict that holds itself.
    let own = Pickle::new().op(b"}q\0").text("x").op(b"h\0s.").0;
    says(&refusal(&own), &["`x`", "is a dict itself"]);
    let far = Pickle::new().op(b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86.").0;
    says(&refusal(&far), &["holds a tuple"]);
    says(&refusal(&Pickle::new().op(b"h\x05").0), &["recalls 5"]);
    let long = archive(&vec![b'N'; (MAX_PICKLE + 1) as usize], &[]);
    says(&read_bytes(&long).unwrap_err(), &["data.pkl", "claims 33554433 bytes"]);
}

#[test]
fn broken_pickles_are_refused() {
    for (pickle, word) in [
        (&b""[..], "protocol 2 to 5"),
        (b"}.", "protocol 2 to 5"),
        (b"\x80\x06}.", "protocol 6"),
        (b"\x80\x01}.", "protocol 1"),
        (b"\x80\x02", "STOP"),
        (b"\x80\x02.", "0 values"),
        (b"\x80\x02NN.", "2 values"),
        (b"\x80\x02(N.", "1 values"),
        (b"\x80\x02}.}", "bytes follow"),
        (b"\x80\x02t.", "mark"),
        (b"\x80\x02u.", "mark"),
        (b"\x80\x02N(\x85.", "not on the stack"),
        (b"\x80\x02R.", "not on the stack"),
        (b"\x80\x02Q.", "not on the stack"),
        (b"\x80\x02b.", "not on the stack"),
        (b"\x80\x02NNNs.", "not a dict"),
        (b"\x80\x02(NNu.", "not a dict"),
        (b"\x80\x02q\0.", "empty stack"),
        (b"\x80\x02)Q.", "not that of a storage"),
        (b"\x80\x02X\x01\0\0\0\xff.", "UTF-8"),
        (b"\x80\x02cos", "ends within a name"),
        (b"\x80\x02\xff.", "0xff"),
    ] {
        says(&refusal(pickle), &["data.pkl", word]);
    }
}

#[test]
fn truncated_anywhere_is_refused() {
    let whole = RECORDED[0];
    for end in 0..whole.len() {
        assert!(read_bytes(&whole[..end]).is_err(), "{end} of {} bytes", whole.len());
    }
    let pickle = one(SIX, 0, &[6], &[1]);
    for end in 0..pickle.len() {
        refusal(&pickle[..end]);
    }
}

#[test]
fn other_archives_are_refused() {
    let pickle = one(SIX, 0, &[6], &[1]);
    let six = six();
    let whole: [(&str, &[u8]); 4] = [
        ("a/data.pkl", &pickle),
        ("a/byteorder", b"little"),
        ("a/data/0", &six),
        ("a/version", b"3"),
    ];
    assert!(read_bytes(&zip(&whole)).is_ok());
    let with = |at: usize, entry: (&'static str, &'static [u8])| {
        let mut entries = whole;
        entries[at] = entry;
        read_bytes(&zip(&entries)).unwrap_err()
    };
    says(&with(1, ("a/byteorder", b"big")), &["`byteorder`", "`big`", "little"]);
    says(&with(3, ("a/version", b"11")), &["`version`", "`11`"]);
    says(&with(3, ("a/version", b"x\n")), &["`version`", "`x"]);
    says(&with(3, ("a/other", b"3")), &["no entry `version`"]);
    says(&with(1, ("a/data/0", b"again")), &["same name"]);
    says(&with(1, ("b/data.pkl", b"")), &["`a/`", "`b/`"]);
    says(&with(0, ("data.pkl", b"")), &["without FOLDER/data.pkl"]);
    says(&with(0, ("a/b/data.pkl", b"")), &["without FOLDER/data.pkl"]);
    let mut flipped = zip(&whole);
    let at = flipped.windows(24).position(|w| w == six).unwrap();
    flipped[at] ^= 1;
    says(&read_bytes(&flipped).unwrap_err(), &["`data/0`", "checksum"]);
    // Both places of an entry's method: deflated.
    let mut deflated = zip(&whole);
    let at = deflated.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    (deflated[8], deflated[at + 10]) = (8, 8);
    says(&read_bytes(&deflated).unwrap_err(), &["`data.pkl`", "compressed"]);
    says(&read_bytes(&zip(&[])).unwrap_err(), &["zip archive"]);
    says(&read_bytes(b"version https://git-lfs").unwrap_err(), &["not a file of `torch.save`"]);
}

#[test]
fn legacy_files_say_what_to_do() {
    let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.";
    let said = read_bytes(legacy).unwrap_err();
    says(&said, &["before 1.6", "save it again", "safetensors"]);
}

#[test]
fn parameters_share_and_attributes_pass() {
    let state = dict().text("x").global("torch._utils", "_rebuild_parameter").op(b"(");
    let state = state.tensor(&SIX, 0, &[3], &[2]).op(b"\x88}tR").op(b"u");
    let pickle = state.op(b"}").text("_metadata").op(b"}sb.").0;
    let read = read_bytes(&archive(&pickle, &[("0", &six())])).unwrap();
    assert_eq!(read["x"], tensor(&[3], &[0.0, 2.0, 4.0]));
}

/// Whatever is read is whole.
fn check_read(bytes: &[u8]) -> std::result::Result<(), TestCaseError> {
    match read_bytes(bytes) {
        Ok(tensors) => {
            for t in tensors.values() {
                prop_assert_eq!(t.shape.iter().product::<usize>(), t.values.len());
            }
        }
        Err(said) => prop_assert!(!said.is_empty() && !said.contains(char::is_control)),
    }
    Ok(())
}

fn mutated(mut bytes: Vec<u8>, edits: &[(usize, u8, u8)]) -> Vec<u8> {
    for &(at, kind, byte) in edits {
        if bytes.is_empty() {
            break;
        }
        let at = at % bytes.len();
        match kind {
            0 => bytes[at] = byte,
            1 => bytes[at] ^= 1 << (byte % 8),
            2 => bytes.insert(at, byte),
            3 => drop(bytes.remove(at)),
            4 => bytes.truncate(at),
            _ => bytes.copy_within(at / 2..at, at / 3),
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn a_mutated_file_is_read_whole_or_refused(
        file in 0..3usize,
        edits in prop::collection::vec((any::<usize>(), 0..6u8, any::<u8>()), 1..4),
    ) {
        check_read(&mutated(RECORDED[file].to_vec(), &edits))?;
    }

    /// The archive is good, so that the pickle is reached.
    #[test]
    fn a_mutated_pickle_is_read_whole_or_refused(
        file in 0..3usize,
        edits in prop::collection::vec((any::<usize>(), 0..6u8, any::<u8>()), 1..4),
    ) {
        let mut good = Archive::open(Cursor::new(RECORDED[file])).unwrap();
        let pickle = mutated(good.read("data.pkl").unwrap(), &edits);
        let storages: Vec<Vec<u8>> =
            (0..5).map(|key| good.read(&format!("data/{key}")).unwrap()).collect();
        let keys = ["0", "1", "2", "3", "4"];
        let storages: Vec<(&str, &[u8])> =
            keys.into_iter().zip(storages.iter().map(Vec::as_slice)).collect();
        check_read(&archive(&pickle, &storages))?;
    }
}
