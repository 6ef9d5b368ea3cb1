use std::fs;

use proptest::prelude::*;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::*;

/// A tokenizer of single bytes in GPT-2's spelling, with trimmed offsets as GPT-2 has them.
pub(crate) fn byte_level() -> tokenizers::Tokenizer {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: Vocab = alphabet
        .into_iter()
        .map(String::from)
        .chain(["<s>".into(), "</s>".into()])
        .zip(0..)
        .collect();
    let next = vocab.len() as u32;
    vocab.insert("Ġa".into(), next);
    let model =
        BPE::builder().vocab_and_merges(vocab, vec![("Ġ".into(), "a".into())]).build().unwrap();
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let byte_level = ByteLevel::default().add_prefix_space(false).trim_offsets(true);
    tokenizer
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level));
    tokenizer
}

/// A tokenizer in the way of Llama 2: words begin with a bar, unknown characters fall back to
/// bytes.
fn byte_fallback() -> tokenizers::Tokenizer {
    let pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "\n"].map(String::from);
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let vocab: Vocab = pieces.into_iter().chain(bytes).zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, vec![("▁".into(), "a".into())])
        .unk_token("<unk>".into())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .unwrap();
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(NormalizerSequence::new(vec![
            Prepend::new("▁".into()).into(),
            Replace::new(" ", "▁").unwrap().into(),
        ])))
        .with_decoder(Some(Sequence::new(vec![
            Replace::new("▁", " ").unwrap().into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
            Strip::new(' ', 1, 0).into(),
        ])));
    tokenizer.add_special_tokens(&["<unk>", "<s>", "</s>"].map(|t| AddedToken::from(t, true)));
    tokenizer
}

/// A model folder with `tokenizer.json` and the given other files.
fn folder(tokenizer: &tokenizers::Tokenizer, files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn open(files: &[(&str, &str)]) -> Result<Tokenizer> {
    Tokenizer::open(folder(&byte_fallback(), files).path())
}

const SPECIALS: (&str, &str) = (
    "tokenizer_config.json",
    r#"{"add_bos_token": true, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#,
);

#[test]
fn a_folder_without_tokenizer_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::open(dir.path()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("no tokenizer.json in"), "{error}");
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(Error::Model { .. })));
}

#[test]
fn special_tokens_come_from_the_files_around() {
    let tokenizer = open(&[SPECIALS]).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("</s>")));
    assert_eq!(tokenizer.stop_ids(), [2]);

    let map = ("special_tokens_map.json", r#"{"eos_token": "</s>", "pad_token": "<unk>"}"#);
    let generation = ("generation_config.json", r#"{"bos_token_id": 1, "eos_token_id": [7, 4]}"#);
    let config = ("config.json", r#"{"eos_token_id": 5}"#);
    let tokenizer = open(&[map, generation, config]).unwrap();
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()),
        (Some(1), Some(2), Some(0))
    );
    assert_eq!(tokenizer.stop_ids(), [2, 4, 5, 7]);

    let tokenizer = open(&[generation, config]).unwrap();
    assert_eq!(tokenizer.eos_id(), Some(7), "generation_config.json goes before config.json");

    let error = open(&[("tokenizer_config.json", r#"{"eos_token": "<eos>"}"#)]).unwrap_err();
    assert!(
        error.to_string().contains("eos_token is `<eos>`, which is not in the vocabulary"),
        "{error}"
    );
    let error = open(&[("config.json", "{")]).unwrap_err();
    assert!(error.to_string().contains("config.json: not valid JSON"), "{error}");
}

#[test]
fn bos_is_added_where_the_tokenizer_says_so_and_never_twice() {
    let tokenizer = open(&[SPECIALS]).unwrap();
    assert_eq!(tokenizer.encode("a").unwrap(), [6]);
    assert_eq!(tokenizer.encode_with_special("a").unwrap(), [1, 6]);
    assert_eq!(tokenizer.encode_with_special("<s>a").unwrap(), tokenizer.encode("<s>a").unwrap());
    assert_eq!(tokenizer.encode_with_special("").unwrap(), [1]);
    let silent = ("tokenizer_config.json", r#"{"bos_token": "<s>"}"#);
    assert_eq!(open(&[silent]).unwrap().encode_with_special("a").unwrap(), [6]);
}

#[test]
fn a_special_token_that_tokenizer_json_forgot_is_one_token() {
    let tokenizer = Tokenizer::from_parts(byte_level(), Some("<s>"), Some("</s>")).unwrap();
    assert_eq!(tokenizer.encode("x</s>").unwrap().len(), 2);
    assert_eq!(tokenizer.encode("</s>").unwrap(), [tokenizer.eos_id().unwrap()]);
}

#[test]
fn offsets_are_bytes_and_leave_no_gap() {
    let tokenizers = [byte_level(), byte_fallback()];
    for inner in tokenizers {
        let tokenizer = Tokenizer::from_parts(inner, Some("<s>"), Some("</s>")).unwrap();
        for text in ["a a  a", "bab\n a", "né 你好 a", " a", "a<s> a</s>"] {
            let tokens = tokenizer.encode_with_offsets(text).unwrap();
            let mut covered = 0;
            for (id, bytes) in &tokens {
                assert!(
                    bytes.start <= covered && text.get(bytes.clone()).is_some(),
                    "{text} {id} {bytes:?}"
                );
                covered = covered.max(bytes.end);
            }
            assert_eq!(covered, text.len(), "{text}: {tokens:?}");
            let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
            assert_eq!(ids, tokenizer.encode(text).unwrap());
        }
    }
}

/// What the stream gives for `ids`, checked to give nothing unfinished on the way.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for &id in ids {
        text.extend(stream.push(id).unwrap());
    }
    text.extend(stream.finish().unwrap());
    text
}

#[test]
fn a_character_of_several_tokens_comes_whole() {
    let tokenizer = Tokenizer::from_parts(byte_level(), None, None).unwrap();
    let mut stream = tokenizer.stream();
    let pieces: Vec<_> =
        tokenizer.encode("a你b").unwrap().into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, [Some("a".into()), None, None, Some("你".into()), Some("b".into())]);
}

#[test]
fn a_space_behind_a_special_token_is_kept() {
    let tokenizer = Tokenizer::from_parts(byte_fallback(), Some("<s>"), Some("</s>")).unwrap();
    let ids = [6, 1, 6, 3, 3, 5];
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a a  b");
    assert_eq!(streamed(&tokenizer, &ids), "a a  b");
}

proptest! {
    #[test]
    fn the_stream_equals_the_decoded_whole(
        ids in prop::collection::vec(0u32..264, 0..40),
        plain in prop::collection::vec(0u32..8, 0..20),
    ) {
        let fallback = Tokenizer::from_parts(byte_fallback(), Some("<s>"), Some("</s>")).unwrap();
        for ids in [&ids, &plain] {
            prop_assert_eq!(streamed(&fallback, ids), fallback.decode(ids, true).unwrap());
        }
        let byte_level = Tokenizer::from_parts(byte_level(), Some("<s>"), Some("</s>")).unwrap();
        let ids: Vec<u32> = ids.into_iter().filter(|&id| (id as usize) < byte_level.vocab_size()).collect();
        prop_assert_eq!(streamed(&byte_level, &ids), byte_level.decode(&ids, true).unwrap());
    }

    #[test]
    fn text_survives_encoding_and_streaming(text in "[ab \n你é😀]{0,20}") {
        let byte_level = Tokenizer::from_parts(byte_level(), None, None).unwrap();
        let ids = byte_level.encode(&text).unwrap();
        prop_assert_eq!(streamed(&byte_level, &ids), text);
    }
}
