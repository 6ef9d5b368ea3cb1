"""Bases, a batch, and the recording of a case as `smore verify --help` lays it out."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "crates/smore-tune/tests/recorded"
DEMO_BASE = ROOT / "crates/smore-cli/assets/demo-base"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]

# A recorded case says nothing where its adapter does nothing.
SMALLEST_EFFECT = 1e-2

# Nor does one whose own rounding is as large as what `smore verify` allows (2e-4 and 5e-4): half of
# it may come from torch's f32, measured against torch's f64 without looking at smore. (Norms and
# the softmax of attention stay in f32 there: transformers says so itself.)
MOST_ROUNDING = (1e-4, 2.5e-4)


def load_base(folder):
    """The base in f32, frozen."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def batch(vocabulary):
    """Two sequences, one of them padded; the first tokens of each have no label."""
    generator = torch.Generator().manual_seed(23)
    ids = torch.randint(3, vocabulary, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def compute(model, inputs, parameters, balance, gradients):
    """Logits, figures and gradients in the model's precision."""
    for parameter in parameters.values():
        parameter.requires_grad_(gradients)
        parameter.grad = None
    result = model(**inputs)
    figures = dict(eval=dict(ce=result.loss.item()))
    if not gradients:
        return result.logits.detach(), figures, {}
    balanced = balance() if balance else torch.zeros(())
    loss = result.loss + balanced
    loss.backward()
    figures["train"] = dict(
        loss=loss.item(), ce=result.loss.item(), balance_loss=balanced.item()
    )
    figures["n_trainable"] = sum(p.numel() for p in parameters.values())
    grads = {f"grad.{name}": p.grad.clone() for name, p in parameters.items()}
    return result.logits.detach(), figures, grads


def rounding(inputs, single, double):
    """How far f32 is from f64: of logits, and of gradients by the tensor's largest value."""
    kept = inputs["attention_mask"].bool()
    logits = (single[0] - double[0])[kept].abs().max().item()
    tops = {name: grad.abs().max().item() for name, grad in double[2].items()}
    smallest = 1e-3 * max(tops.values(), default=0.0)
    return logits, max(
        ((single[2][n] - g).abs().max().item() / max(tops[n], smallest)
         for n, g in double[2].items()),
        default=0.0,
    )


def record(folder, model, parameters, plain, balance=None, gradients=True):
    """Writes fixture.safetensors and fixture.json; afterwards the model is in f64.

    `parameters` are the adapter's by their names in its file, `plain` the base's logits, `balance`
    gives the balance loss of the last forward pass.
    """
    inputs = batch(model.config.vocab_size)
    logits, figures, grads = single = compute(model, inputs, parameters, balance, gradients)
    effect = (logits - plain).abs().max().item()
    assert effect > SMALLEST_EFFECT, f"{folder}: the adapter moves logits by {effect} only"
    noise = rounding(
        inputs, single, compute(model.double(), inputs, parameters, balance, gradients)
    )
    assert all(n <= most for n, most in zip(noise, MOST_ROUNDING)), f"{folder}: f32 is off by {noise}"
    figures |= dict(effect=effect, f64_logits=noise[0], f64_gradients=noise[1])
    tensors = dict(inputs, logits=logits, **grads)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "fixture.safetensors")
    (folder / "fixture.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(
        f"recorded {folder.name}: moves logits by {effect:.2f}; "
        f"f32 rounds logits by {noise[0]:.1e}, gradients by {noise[1]:.1e}"
    )


def write_config(folder, settings):
    (folder / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )


def name_base(folder, base):
    """Where the case finds its base, in the key that all formats have for it."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["base_model_name_or_path"] = os.path.relpath(base, folder)
    write_config(folder, settings)


