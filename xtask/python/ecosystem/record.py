"""Records the cases that tests run without Python.

    python record.py crates/smore-tune/tests/recorded/adapters
"""

import sys
from pathlib import Path

import lora_in
import mixtures

FROM_PEFT = ["gemma2__rslora_ranks", "llama__bin", "qwen2__bin_bf16", "qwen3__exclude_pattern"]
FROM_OTHERS = [
    "gemma2__hydra_lora", "llama__loramoe", "llama__mola", "gemma2__mix_lora_attention",
    "mistral__mix_lora_some", "llama__moe_peft_lora_rslora",
]

if __name__ == "__main__":
    for module, cases in (lora_in, FROM_PEFT), (mixtures, FROM_OTHERS):
        for case in cases:
            module.make(Path(sys.argv[1]) / case, *case.split("__"))
