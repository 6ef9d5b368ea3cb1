//! The matrix unit that Intel calls AMX: eight registers, each a tile of 16 rows of 64 bytes, and an
//! instruction that multiplies two tiles of pairs in bf16 and adds to one in f32.
//!
//! The language has no types for tiles yet, so each loop is written in assembly as a whole, as the chapter on
//! AMX of Intel's optimization manual lays it out: sums of 32 x 32 in four tiles, operands in the others.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::packing::LANES;

/// Rows and columns whose sums stay in tiles: four of them, two by two.
pub(super) const SIDE: usize = 2 * LANES;
/// Words of two tiles: what an operand in one part has for 16 words of depth.
pub(super) const PAIR: usize = SIDE * LANES;
/// Lines of the cache that a loop asks for ahead, for every 16 words of depth of a part of the left
/// operand.
pub(super) const AHEAD: usize = 4;

/// Whether this processor has the unit and the system lets this program use it; asks for that once.
pub(super) fn available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| has_unit() && permitted());
    *AVAILABLE
}

fn has_unit() -> bool {
    // Leaf 7: bits 22 and 24 of edx are products of bf16 and tiles.
    let needed = 1 << 22 | 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & needed == needed
}

/// Linux keeps 8 KiB more for every thread that uses tiles, so a program has to ask before it does.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: asks for a permission; no memory is involved.
        let answer =
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        answer == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The tiles of this thread, configured until this is dropped.
pub(super) struct Unit {
    of_this_thread: PhantomData<*const ()>,
}

impl Unit {
    /// All eight tiles, 16 rows of 64 bytes each.
    ///
    /// # Panics
    /// Where the unit is not [`available`].
    pub(super) fn configured() -> Self {
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        assert!(available(), "matrix unit");
        let mut tiles = Configuration([0; 64]);
        tiles.0[0] = 1;
        for tile in 0..8 {
            tiles.0[16 + 2 * tile] = 64;
            tiles.0[48 + tile] = LANES as u8;
        }
        // SAFETY: the unit is there; 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const tiles, options(nostack, readonly)) };
        Self { of_this_thread: PhantomData }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: the unit is there. What is released the system need not save.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Loads one of two tiles of the left operand: rows of 64 bytes one behind the other.
macro_rules! left {
    (0, $at:literal) => {
        concat!("tileloadd tmm4, [{a} + {row_a} + ", $at, "]")
    };
    (1, $at:literal) => {
        concat!("tileloadd tmm5, [{a} + {row_a} + ", $at, "]")
    };
}

/// Loads one of two tiles of the right operand, which stand beside each other.
macro_rules! right {
    (0, $at:literal) => {
        concat!("tileloadd tmm6, [{b} + {row} + ", $at, "]")
    };
    (1, $at:literal) => {
        concat!("tileloadd tmm7, [{b} + {row} + ", $at, "]")
    };
}

/// Both products of one tile with two of the other operand.
macro_rules! products {
    (left 0) => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7"
    };
    (left 1) => {
        "tdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
    };
    (right 0) => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm2, tmm5, tmm6"
    };
    (right 1) => {
        "tdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Four lines for the second cache.
macro_rules! ahead {
    () => {
        "prefetcht2 [{ahead}]\n\
         prefetcht2 [{ahead} + 64]\n\
         prefetcht2 [{ahead} + 128]\n\
         prefetcht2 [{ahead} + 192]\n\
         add {ahead}, 256"
    };
}

/// A loop over depth. `$left` and `$right` are the bytes of 16 words of depth.
macro_rules! kernel {
    ($name:ident, $left:literal, $right:literal, $($step:expr),+) => {
        /// # Safety
        /// Tiles are configured; the operands have so many steps, and the sums 32 x 32.
        unsafe fn $name(
            a: *const u32,
            b: *const u32,
            steps: usize,
            sums: *mut f32,
            add: bool,
            ahead: *const u32,
        ) {
            // SAFETY: as promised by the caller; what is asked for ahead need not be there.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}",
                    "jnz 3f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 4f",
                    "3:",
                    "tileloadd tmm0, [{sums} + {row}]",
                    "tileloadd tmm1, [{sums} + {row} + 64]",
                    "tileloadd tmm2, [{sums} + {row} + 2048]",
                    "tileloadd tmm3, [{sums} + {row} + 2112]",
                    "4:",
                    "test {steps}, {steps}",
                    "jz 5f",
                    "2:",
                    $($step,)+
                    concat!("add {a}, ", $left),
                    concat!("add {b}, ", $right),
                    "dec {steps}",
                    "jnz 2b",
                    "5:",
                    "tilestored [{sums} + {row}], tmm0",
                    "tilestored [{sums} + {row} + 64], tmm1",
                    "tilestored [{sums} + {row} + 2048], tmm2",
                    "tilestored [{sums} + {row} + 2112], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    ahead = inout(reg) ahead => _,
                    steps = inout(reg) steps => _,
                    add = in(reg) u32::from(add),
                    row_a = in(reg) 64usize,
                    row = in(reg) 128usize,
                    sums = in(reg) sums,
                    out("tmm0") _,
                    out("tmm1") _,
                    out("tmm2") _,
                    out("tmm3") _,
                    out("tmm4") _,
                    out("tmm5") _,
                    out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

// A tile is loaded as soon as the last product with the one before it is under way: an operand whose part
// changes next is the one by whose tiles products are ordered.
kernel!(
    one_by_one,
    2048,
    2048,
    left!(0, 0),
    right!(0, 0),
    right!(1, 64),
    ahead!(),
    products!(left 0),
    left!(1, 1024),
    products!(left 1)
);

kernel!(
    three_by_one,
    6144,
    2048,
    right!(0, 0),
    right!(1, 64),
    left!(0, 4096),
    ahead!(),
    products!(left 0),
    left!(1, 5120),
    left!(0, 2048),
    ahead!(),
    products!(left 1),
    products!(left 0),
    left!(1, 3072),
    left!(0, 0),
    ahead!(),
    products!(left 1),
    products!(left 0),
    left!(1, 1024),
    products!(left 1)
);

// Parts (3, 1), (2, 1), (2, 2), (1, 2), (1, 3), (1, 1): from one to the next one operand stays.
kernel!(
    three_by_three,
    6144,
    6144,
    left!(0, 4096),
    right!(0, 0),
    right!(1, 64),
    ahead!(),
    products!(left 0),
    left!(1, 5120),
    left!(0, 2048),
    products!(left 1),
    left!(1, 3072),
    products!(right 0),
    right!(0, 2048),
    products!(right 1),
    right!(1, 2112),
    ahead!(),
    products!(left 0),
    left!(0, 0),
    products!(left 1),
    left!(1, 1024),
    products!(right 0),
    right!(0, 4096),
    products!(right 1),
    right!(1, 4160),
    ahead!(),
    products!(right 0),
    right!(0, 0),
    products!(right 1),
    right!(1, 64),
    products!(left 0),
    products!(left 1)
);

/// `sums`, 32 x 32 in f32, = A B, + `sums` where `add`.
///
/// A is in `p` parts of which each element is the sum, pairs in bf16: for every 16 words of depth and every part
/// two tiles of 16 rows, `[depth / 16, p, 2, 16, 16]`. B is in `q` parts, `[depth / 16, q, 16, 32]`. Products of
/// parts that together are no more than 2^-24 of the whole are left out. The lines from `ahead` on are
/// asked for, [`AHEAD`] for every 16 words of depth and part of A.
///
/// # Panics
/// If the operands do not have whole tiles, the same depth or 1 or 3 parts, or sums are not so many.
pub(super) fn multiply(
    _: &Unit,
    (p, q): (usize, usize),
    a: &[u32],
    b: &[u32],
    sums: &mut [f32],
    add: bool,
    ahead: *const u32,
) {
    let steps = a.len() / (p * PAIR);
    assert!(a.len() == steps * p * PAIR && b.len() == steps * q * PAIR, "tiles of a product");
    assert!(sums.len() == SIDE * SIDE, "sums of a product");
    let kernel = match (p, q) {
        (1, 1) => one_by_one,
        (3, 1) => three_by_one,
        (3, 3) => three_by_three,
        _ => unreachable!("one part or three"),
    };
    // SAFETY: there is a unit; lengths are as asserted.
    unsafe { kernel(a.as_ptr(), b.as_ptr(), steps, sums.as_mut_ptr(), add, ahead) };
}
