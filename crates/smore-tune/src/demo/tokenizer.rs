//! A small byte-level tokenizer trained on the demo's own text.
//!
//! The merges are learned here and not by the trainer of the tokenizers crate: that one keeps
//! pairs in hash maps with random keys, and where one token can be merged in two ways the outcome
//! may depend on their order. The base must be rebuilt alike on every machine.

use std::collections::{BTreeMap, HashMap};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Result, Tokenizer,
};

/// Begin of a sequence, id 0.
pub const BOS: &str = "<s>";
/// End of a sequence, id 1.
pub const EOS: &str = "</s>";
/// Stands for a byte that the alphabet lacks, id 2.
pub const UNK: &str = "<unk>";

/// Trains a byte-level BPE tokenizer on `documents`.
///
/// Digits are tokens of their own, so that numbers can be copied digit by digit. The alphabet is
/// printable ASCII and the newline, besides the bytes of the documents; any other byte becomes
/// [`UNK`]. Encoding with special tokens puts [`BOS`] first. The vocabulary stays smaller than
/// `vocab_size` when the documents have no pair left to merge.
///
/// # Errors
/// `vocab_size` is smaller than the alphabet with the special tokens.
pub fn train_tokenizer(documents: &[String], vocab_size: usize) -> Result<Tokenizer> {
    let words = count_words(documents)?;
    let mut tokens = initial_tokens(&words);
    if tokens.len() > vocab_size {
        return Err(format!(
            "vocab_size is {vocab_size} but the alphabet alone has {} tokens",
            tokens.len()
        )
        .into());
    }
    let merges = learn_merges(&words, &mut tokens, vocab_size);
    let ids: Vocab = tokens.into_iter().zip(0..).collect();
    let model = BPE::builder().vocab_and_merges(ids, merges).unk_token(UNK.to_owned()).build()?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_pre_tokenizer(Some(pre_tokenizer()))
        .with_decoder(Some(ByteLevel::default()))
        .with_post_processor(Some(
            TemplateProcessing::builder()
                .try_single(format!("{BOS} $A"))?
                .special_tokens(vec![(BOS, 0)])
                .build()?,
        ));
    tokenizer.add_special_tokens(&[BOS, EOS, UNK].map(|t| AddedToken::from(t, true)));
    Ok(tokenizer)
}

fn pre_tokenizer() -> Sequence {
    Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, false, true).into()])
}

/// Pieces that no merge may cross, in the byte-level alphabet, with their counts.
fn count_words(documents: &[String]) -> Result<BTreeMap<String, u64>> {
    let pre_tokenizer = pre_tokenizer();
    let mut words = BTreeMap::new();
    for document in documents {
        let mut text = PreTokenizedString::from(document.as_str());
        pre_tokenizer.pre_tokenize(&mut text)?;
        for (word, _, _) in text.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            *words.entry(word.to_owned()).or_default() += 1;
        }
    }
    Ok(words)
}

/// Special tokens, then the alphabet in order.
fn initial_tokens(words: &BTreeMap<String, u64>) -> Vec<String> {
    // Byte level writes space and newline as these two letters and leaves '!' to '~' alone.
    let mut alphabet: Vec<char> = ('!'..='~').chain(['\u{120}', '\u{10a}']).collect();
    alphabet.extend(words.keys().flat_map(|w| w.chars()));
    alphabet.sort_unstable();
    alphabet.dedup();
    let special = [BOS, EOS, UNK].map(str::to_owned);
    special.into_iter().chain(alphabet.into_iter().map(String::from)).collect()
}

/// Merges the most frequent pair until `tokens` has `vocab_size` entries; a tie goes to the pair
/// of lower ids. All counts are taken anew for every merge: a few hundred distinct words make that
/// cheap, and nothing can go stale.
fn learn_merges(
    words: &BTreeMap<String, u64>,
    tokens: &mut Vec<String>,
    vocab_size: usize,
) -> Vec<(String, String)> {
    let ids: HashMap<String, usize> = tokens.iter().cloned().zip(0..).collect();
    let mut spelled: Vec<(Vec<usize>, u64)> = words
        .iter()
        .map(|(word, &count)| {
            (word.chars().map(|c| ids[c.encode_utf8(&mut [0; 4]) as &str]).collect(), count)
        })
        .collect();
    let mut merges = Vec::new();
    while tokens.len() < vocab_size {
        let Some((left, right)) = most_frequent_pair(&spelled) else {
            break;
        };
        let joined = format!("{}{}", tokens[left], tokens[right]);
        merges.push((tokens[left].clone(), tokens[right].clone()));
        // A token may be reached in two ways; the second merge leads to the same id.
        let id = tokens.iter().position(|t| *t == joined).unwrap_or_else(|| {
            tokens.push(joined);
            tokens.len() - 1
        });
        for (word, _) in &mut spelled {
            merge(word, (left, right), id);
        }
    }
    merges
}

fn most_frequent_pair(spelled: &[(Vec<usize>, u64)]) -> Option<(usize, usize)> {
    let mut counts: BTreeMap<(usize, usize), u64> = BTreeMap::new();
    for (word, count) in spelled {
        for pair in word.windows(2) {
            *counts.entry((pair[0], pair[1])).or_default() += count;
        }
    }
    counts
        .into_iter()
        .max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair)))
        .map(|(pair, _)| pair)
}

fn merge(word: &mut Vec<usize>, (left, right): (usize, usize), id: usize) {
    let mut i = 0;
    while i + 1 < word.len() {
        if word[i] == left && word[i + 1] == right {
            word[i] = id;
            word.remove(i + 1);
        }
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::VOCAB_SIZE;
    use crate::demo::corpus::corpus;

    fn trained(seed: u64) -> Tokenizer {
        train_tokenizer(&corpus(seed, 500), VOCAB_SIZE).unwrap()
    }

    #[test]
    fn two_trainings_give_the_same_file() {
        let json = trained(1).to_string(true).unwrap();
        assert_eq!(json, trained(1).to_string(true).unwrap());
        assert_ne!(json, trained(2).to_string(true).unwrap());
    }

    #[test]
    fn the_vocabulary_is_full_and_starts_with_the_special_tokens() {
        let tokenizer = trained(1);
        assert_eq!(tokenizer.get_vocab_size(true), VOCAB_SIZE);
        for (id, token) in (0..).zip([BOS, EOS, UNK]) {
            assert_eq!(tokenizer.token_to_id(token), Some(id));
        }
    }

    #[test]
    fn text_survives_and_digits_stand_alone() {
        let tokenizer = trained(1);
        let text = "Order 4127 {on} the press\nis \"open\" ~ 2026-03-14?";
        let encoding = tokenizer.encode(text, true).unwrap();
        assert_eq!(encoding.get_ids()[0], 0);
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text);
        let digits = |t: &&String| t.chars().any(|c| c.is_ascii_digit());
        assert!(encoding.get_tokens().iter().filter(digits).all(|t| t.len() == 1));
    }

    /// What is read back from a file encodes as the tokenizer that was trained.
    #[test]
    fn a_saved_tokenizer_encodes_alike() {
        let tokenizer = trained(1);
        let loaded: Tokenizer = tokenizer.to_string(false).unwrap().parse().unwrap();
        for document in corpus(9, 200) {
            let ids = |t: &Tokenizer| t.encode(document.as_str(), true).unwrap().get_ids().to_vec();
            assert_eq!(ids(&tokenizer), ids(&loaded));
        }
    }

    #[test]
    fn frequent_words_become_one_token() {
        let encoding = trained(1).encode(" the order press", false).unwrap();
        assert_eq!(encoding.len(), 3, "{:?}", encoding.get_tokens());
    }

    #[test]
    fn a_vocabulary_below_the_alphabet_is_refused() {
        let error = train_tokenizer(&corpus(1, 5), 50).unwrap_err();
        assert!(error.to_string().contains("vocab_size is 50"), "{error}");
    }
}
