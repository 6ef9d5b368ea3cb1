#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop((smore_fuzz::reader("model_config").read)(bytes)));
