//! Devices and the numeric operations that fine-tuning a frozen decoder needs.
//!
//! The engine knows nothing of adapters, models or files. Model and adapter code is written once
//! over [`Device`]; [`cpu::Cpu`] implements it in `f32` (training) and `f64` (gradient checks).
//! Every operation has its backward pass beside its forward pass, in one file.
//!
//! All matrices are row-major.

pub mod buffer;
pub mod cpu;
pub mod device;
pub mod float;
pub mod heap;
pub mod matrix;
pub mod scratch;
pub mod team;

pub use buffer::{Mat, MatMut, View, ViewMut};
pub use cpu::Cpu;
pub use device::{
    AdamW, AttentionShape, CrossEntropy, Device, Dropout, GateActivation, MatrixRef, RmsNorm,
    Slopes, Span, Term,
};
pub use float::Float;
pub use matrix::{Dtype, HostMatrix};
pub use scratch::Scratch;
