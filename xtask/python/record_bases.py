"""Records small decoders with random weights: transformers' folder as it writes it, a batch, and
what transformers computes of it. The layout is that of `smore verify`'s base cases.

    python record_bases.py OUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
)

FAMILIES = {
    "llama": dict(
        rope_parameters=dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=16,
        ),
        attention_bias=True, mlp_bias=True,
    ),
    "mistral": dict(sliding_window=6),
    "qwen2": dict(
        head_dim=None, sliding_window=5, use_sliding_window=True, max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "gemma2": dict(
        sliding_window=7, query_pre_attn_scalar=12, attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
}


def model_of(family, extra):
    torch.manual_seed(7)
    settings = {k: v for k, v in {**COMMON, **extra}.items() if v is not None}
    config = AutoConfig.for_model(family, **settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Norms and biases start at constants that would hide a wrong one.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def record(family, extra, out):
    model = model_of(family, extra)
    # Qwen 2 in several files, as large models come.
    shard = "20KB" if family == "qwen2" else "50GB"
    model.save_pretrained(out, max_shard_size=shard)
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, COMMON["vocab_size"], (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    ids[1, 13:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    with torch.no_grad():
        result = model(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        greedy = model.generate(ids[:1, :6], max_new_tokens=14, do_sample=False)
    tensors = dict(input_ids=ids, attention_mask=mask, labels=labels, logits=result.logits)
    tensors |= {f"hidden.{i}": h for i, h in enumerate(result.hidden_states)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "fixture.safetensors")
    facts = dict(loss=result.loss.item(), transformers=transformers.__version__)
    (out / "fixture.json").write_text(json.dumps(facts, indent=1) + "\n")
    generated = dict(prompt=ids[0, :6].tolist(), greedy=dict(use_cache=greedy[0].tolist()))
    (out / "generate.json").write_text(json.dumps(generated) + "\n")
    print(family, facts)


if __name__ == "__main__":
    for family, extra in FAMILIES.items():
        record(family, extra, Path(sys.argv[1]) / family)
