//! Fine-tuning of frozen Hugging Face models with the adapters of [`smore`].

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod demo;
pub mod error;
pub mod inject;
pub mod model;
pub mod report;
pub mod template;
pub mod tokenizer;
pub mod verify;
