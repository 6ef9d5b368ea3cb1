//! The token table: rows read forward, gradients added to rows backward.

use super::{Cpu, linear};
use crate::{Float, MatrixRef};

pub(super) fn forward<T: Float>(ids: &[u32], table: &MatrixRef<Cpu<T>>, y: &mut [T]) {
    let (rows, d) = linear::shape(table);
    assert_eq!(y.len(), ids.len() * d, "embedding shapes");
    for (&id, y) in ids.iter().zip(y.chunks_exact_mut(d)) {
        let id = id as usize;
        assert!(id < rows, "token {id} outside the table of {rows}");
        match table {
            MatrixRef::Frozen(host) => linear::widen(host, id, y),
            MatrixRef::Trained(view, ..) => {
                y.copy_from_slice(&Cpu::slice(*view)[id * d..(id + 1) * d]);
            }
        }
    }
}

pub(super) fn backward<T: Float>(ids: &[u32], dy: &[T], dtable: &mut [T]) {
    let d = dy.len() / ids.len().max(1);
    for (&id, dy) in ids.iter().zip(dy.chunks_exact(d)) {
        let row = &mut dtable[id as usize * d..(id as usize + 1) * d];
        for (t, &g) in row.iter_mut().zip(dy) {
            *t += g;
        }
    }
}
