"""LoRAs that smore wrote, loaded by PEFT: what PEFT computes of them becomes a case beside them.

    python lora_out.py DIR

DIR holds adapter folders whose `base_model_name_or_path` is absolute.
"""

import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import batch, load_base, logits_of, record
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file


def load(folder):
    """The model with the adapter; no tensor and no key may be missing, unknown or changed."""
    base = load_base(json.loads((folder / "adapter_config.json").read_text())
                     ["base_model_name_or_path"])
    plain = logits_of(base, batch(base.config.vocab_size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What the next version of a package will have renamed says nothing about the adapter.
        for about_packages in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", about_packages)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    stored, held = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert stored.keys() == held.keys(), f"{folder}: {stored.keys() ^ held.keys()}"
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32, f"{folder}: {name} is {tensor.dtype}"
        assert torch.equal(tensor, held[name]), f"{folder}: {name} is not what PEFT holds"
    return model, plain


def check_strictness(folder):
    """Adapters with a tensor too few, one too many, and an unknown key must not load."""
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    config = json.loads((folder / "adapter_config.json").read_text())
    spoilt = [
        ({n: t for n, t in tensors.items() if n != name}, config),
        (tensors | {name.replace("layers.0", "layers.99"): tensors[name].clone()}, config),
        (tensors, config | dict(smore_only=1)),
    ]
    for tensors, config in spoilt:
        with TemporaryDirectory() as copy:
            copy = Path(copy)
            (copy / "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
            try:
                load(copy)
            except (AssertionError, UserWarning):
                continue
            raise AssertionError("a spoilt adapter was loaded")


def main(folder):
    model, plain = load(folder)
    parameters = {
        name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name
    }
    record(folder, model, parameters, plain)


if __name__ == "__main__":
    folders = sorted(p.parent for p in Path(sys.argv[1]).glob("*/adapter_config.json"))
    assert folders, f"no adapters in {sys.argv[1]}"
    check_strictness(folders[0])
    for folder in folders:
        main(folder)
