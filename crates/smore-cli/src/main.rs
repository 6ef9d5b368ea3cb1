//! The program `smore`: one file per command; all printing happens here.

// A program's output is its interface.
#![allow(clippy::print_stdout, clippy::print_stderr)]

        Command::Data(args) => data::run(&args),
