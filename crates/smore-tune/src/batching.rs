//! Which samples come together: packs of short samples, and batches of samples of like length.

use crate::config::TrainConfig;
use rand::Rng;
use rand::seq::SliceRandom;
use std::collections::BTreeMap;

/// Batches among which samples are sorted by length, as in Hugging Face's trainer.
const GROUPED_BATCHES: usize = 50;

/// The entries of batches: single samples, or packs of them.
pub(crate) fn entries(train: &TrainConfig, lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    if train.packing {
        packs(lengths, capacity)
    } else {
        (0..lengths.len()).map(|i| vec![i]).collect()
    }
}

/// Puts samples into packs of at most `capacity` tokens, the longest first and each into the
/// fullest pack that has room. A longer sample is a pack by itself.
fn packs(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // By the room that is left.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in order {
        let room = open.range(lengths[i]..).next().map(|(&room, _)| room);
        let found = room.and_then(|room| Some((open.get_mut(&room)?.pop()?, room)));
        let (pack, room) = found.unwrap_or_else(|| {
            packs.push(Vec::new());
            (packs.len() - 1, capacity)
        });
        if open.get(&room).is_some_and(Vec::is_empty) {
            open.remove(&room);
        }
        packs[pack].push(i);
        open.entry(room.saturating_sub(lengths[i])).or_default().push(pack);
    }
    packs
}

/// Brings samples of like length together in a shuffled `order`, so that batches cut from it one
/// after the other are even; which batches come when stays a matter of chance.
pub(crate) fn group_by_length(
    order: &mut [usize],
    lengths: &[usize],
    batch: usize,
    rng: &mut impl Rng,
) {
    for part in order.chunks_mut(batch * GROUPED_BATCHES) {
        part.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    }
    // The last batch may be smaller and stays last.
    let whole = order.len() / batch * batch;
    let mut batches: Vec<Vec<usize>> = order[..whole].chunks(batch).map(<[_]>::to_vec).collect();
    batches.shuffle(rng);
    for (place, i) in order.iter_mut().zip(batches.into_iter().flatten()) {
        *place = i;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use smore::rng::{Purpose, stream};

    proptest! {
        /// Every sample once, no pack too full, and no two packs that would fit into one.
        #[test]
        fn packs_hold_every_sample_once(
            lengths in proptest::collection::vec(1usize..40, 0..80),
            capacity in 20usize..60,
        ) {
            let packs = packs(&lengths, capacity);
            let mut all: Vec<usize> = packs.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let filled = |pack: &Vec<usize>| pack.iter().map(|&i| lengths[i]).sum::<usize>();
            for pack in &packs {
                prop_assert!(pack.len() == 1 || filled(pack) <= capacity);
            }
            let mut sizes: Vec<usize> = packs.iter().map(filled).collect();
            sizes.sort_unstable();
            prop_assert!(sizes.len() < 2 || sizes[0] + sizes[1] > capacity);
        }

        #[test]
        fn groups_hold_every_sample_once(
            lengths in proptest::collection::vec(1usize..400, 1..300),
            batch in 1usize..7,
            seed in 0u64..9,
        ) {
            let mut order: Vec<usize> = (0..lengths.len()).collect();
            group_by_length(&mut order, &lengths, batch, &mut stream(seed, Purpose::Order, 0, 0));
            order.sort_unstable();
            prop_assert_eq!(order, (0..lengths.len()).collect::<Vec<_>>());
        }
    }

    /// Lengths within a batch are closer than by chance, and batches do not come sorted.
    #[test]
    fn batches_are_even_and_in_a_seeded_order() {
        let lengths: Vec<usize> = (0..400).map(|i| 1 + (i * 7919) % 400).collect();
        let grouped = |seed| {
            let mut order: Vec<usize> = (0..400).collect();
            group_by_length(&mut order, &lengths, 4, &mut stream(seed, Purpose::Order, 0, 0));
            order
        };
        let order = grouped(1);
        let spread = |order: &[usize]| -> usize {
            let batch = |b: &[usize]| {
                let of = b.iter().map(|&i| lengths[i]);
                of.clone().max().unwrap() - of.min().unwrap()
            };
            order.chunks(4).map(batch).sum()
        };
        let plain: Vec<usize> = (0..400).collect();
        assert!(spread(&order) * 20 < spread(&plain), "{}", spread(&order));
        assert_eq!(order, grouped(1));
        assert_ne!(order, grouped(2));
        let first: Vec<usize> = order.chunks(4).map(|b| lengths[b[0]]).collect();
        assert!(!first.is_sorted() && !first.iter().rev().is_sorted());
    }
}
