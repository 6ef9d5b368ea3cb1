#![no_main]

use libfuzzer_sys::fuzz_target;
use smore_fuzz::reader;

fuzz_target!(|bytes: &[u8]| drop((reader("torch_file").read)(bytes)));
