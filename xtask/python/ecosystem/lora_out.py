"""LoRAs that smore wrote, loaded by PEFT: what PEFT computes of them becomes a case beside them.

    python lora_out.py DIR

DIR holds adapter folders whose `base_model_name_or_path` is absolute.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from common import batch, load_base, logits_of, record
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file


def load(folder):
    """The model with the adapter; no tensor and no key may be missing, unknown or changed."""
    base = load_base(json.loads((folder / "adapter_config.json").read_text())
                     ["base_model_name_or_path"])
    plain = logits_of(base, batch(base.config.vocab_size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    stored, held = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert stored.keys() == held.keys(), f"{folder}: {stored.keys() ^ held.keys()}"
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32, f"{folder}: {name} is {tensor.dtype}"
        assert torch.equal(tensor, held[name]), f"{folder}: {name} is not what PEFT holds"
    return model, plain


def main(folder):
    model, plain = load(folder)
    parameters = {
        name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name
    }
    record(folder, model, parameters, plain)


if __name__ == "__main__":
    folders = sorted(p.parent for p in Path(sys.argv[1]).glob("*/adapter_config.json"))
    assert folders, f"no adapters in {sys.argv[1]}"
    for folder in folders:
        main(folder)
