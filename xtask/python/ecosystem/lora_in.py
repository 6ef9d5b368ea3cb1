"""LoRAs that PEFT makes and saves, with every option smore reads, as cases; and such with options
that it must refuse.

    python lora_in.py CASES REFUSED

A refused adapter's folder is called KEY or KEY__DETAIL after the key that the message must name.
"""

import sys
from pathlib import Path

import torch
from common import FAMILIES, RECORDED, batch, load_base, logits_of, name_base, record
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

# Larger factors amplify rounding to what `smore verify` allows.
DRAWN = 0.2

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Of each: arguments of LoraConfig.
READ = {
    "names": dict(r=3, lora_alpha=5, target_modules=["q_proj", "mlp.down_proj"]),
    "pattern": dict(r=2, target_modules=r".*\.[02]\.(self_attn\.[qv]|mlp\.(?!up)\w+)_proj"),
    "all_linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
    "exclude": dict(r=2, target_modules=LINEAR, exclude_modules=["1.mlp.up_proj", "o_proj"]),
    "exclude_pattern": dict(
        r=2, target_modules="all-linear", exclude_modules=r".*layers\.0\..*|.*down_proj"
    ),
    "blocks": dict(r=2, target_modules=["v_proj", "up_proj"], layers_to_transform=[0, 2]),
    "one_block": dict(
        r=2, target_modules=["gate_proj"], layers_to_transform=1, layers_pattern="layers"
    ),
    "ranks": dict(
        r=2, lora_alpha=4, target_modules=LINEAR,
        rank_pattern={r"layers\.1\.mlp\.up_proj": 5, "up_proj": 3, "^model.layers.0.+k_proj": 4},
        alpha_pattern={"v_proj": 9, r"2\.self_attn\.o_proj": 1.5},
    ),
    "rslora_ranks": dict(
        r=3, lora_alpha=2, use_rslora=True, target_modules=r"model\.layers\.\d+\.mlp\..*_proj",
        rank_pattern={"down_proj": 6}, alpha_pattern={"gate_proj": 7},
    ),
    "bin": dict(r=3, lora_alpha=6, target_modules=["k_proj", "gate_proj"]),
    "bin_bf16": dict(r=2, lora_alpha=3, target_modules=["o_proj", "down_proj"]),
    "safetensors_f16": dict(r=2, lora_alpha=3, target_modules=["o_proj", "up_proj"]),
    "orthogonal": dict(r=2, target_modules=["q_proj"], init_lora_weights="orthogonal"),
    "gaussian": dict(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"),
}

REFUSED = {
    "use_dora": dict(use_dora=True),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "bias__all": dict(bias="all"),
    "bias__lora_only": dict(bias="lora_only"),
    "lora_bias": dict(lora_bias=True),
    "layer_replication": dict(layer_replication=[(0, 2), (1, 3)]),
    "lm_head": dict(target_modules=["q_proj", "lm_head"]),
    "embed_tokens": dict(target_modules=["q_proj", "embed_tokens"]),
    "trainable_token_indices": dict(trainable_token_indices=[1, 2]),
    # These change the base when they are loaded.
    "init_lora_weights__pissa": dict(init_lora_weights="pissa"),
    "init_lora_weights__pissa_niter_2": dict(init_lora_weights="pissa_niter_2"),
    "init_lora_weights__olora": dict(init_lora_weights="olora"),
}


def adapter(base, arguments):
    """A PEFT model whose factors are all drawn."""
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(DRAWN * torch.randn_like(parameter))
    return model


def save(model, folder, base, name):
    """Saves as asked by the case's name, and rounds the model's factors likewise."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(name.split("_")[-1])
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    name_base(folder, base)
    factors = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    if dtype:
        with torch.no_grad():
            for factor in factors.values():
                factor.copy_(factor.to(dtype))
    values = {n: p.detach().to(dtype or p.dtype).contiguous() for n, p in factors.items()}
    if name.startswith("bin"):
        # As PEFT did before it wrote safetensors.
        (folder / "adapter_model.safetensors").unlink()
        torch.save(values, folder / "adapter_model.bin")
    elif dtype:
        save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return factors


def make(folder, family, name):
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(RECORDED / family)
    plain = logits_of(base, batch(base.config.vocab_size))
    model = adapter(base, READ[name])
    factors = save(model, folder, RECORDED / family, name)
    record(folder, model, factors, plain)


def make_refused(folder, arguments):
    folder.mkdir(parents=True, exist_ok=True)
    model = adapter(
        load_base(RECORDED / "llama"), dict(r=2, target_modules=["q_proj"]) | arguments
    )
    model.save_pretrained(folder)
    name_base(folder, RECORDED / "llama")
    save_file(batch(model.config.vocab_size), folder / "fixture.safetensors")
    print(f"to be refused: {folder.name}")


if __name__ == "__main__":
    cases, refused = map(Path, sys.argv[1:])
    for family in FAMILIES:
        for name in READ:
            make(cases / f"{family}__{name}", family, name)
    for name, arguments in REFUSED.items():
        make_refused(refused / name, arguments)
