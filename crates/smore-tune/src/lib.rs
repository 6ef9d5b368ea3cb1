//! Fine-tuning of frozen Hugging Face models with the adapters of [`smore`].

mod batching;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod demo;
pub mod distill;
pub mod error;
pub mod generate;
pub mod grow;
pub mod inject;
mod learning_rates;
pub mod memory;
pub mod merge;
pub mod model;
mod optimizer;
pub mod report;
pub mod routing;
pub mod run_folder;
pub mod run_report;
pub mod sample_text;
pub mod schedule;
mod selection;
pub mod sft;
pub mod targets;
pub mod template;
pub mod tokenizer;
pub mod verify;
