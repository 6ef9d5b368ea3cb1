"""Adapters of MoE-PEFT and HydraLoRA: their files, written as those projects write them, and what
they compute, restated here in plain PyTorch on transformers' models, as cases.

    python mixtures.py CASES REFUSED

A refused adapter's folder is called KEY__DETAIL after the key that the message must name.
"""

import math
import sys
from pathlib import Path

import torch
from common import RECORDED, batch, load_base, logits_of, name_base, record, write_config
from safetensors.torch import save_file
from torch.nn import Parameter
from torch.nn.functional import linear

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]
# What MoE-PEFT takes where its files have no `router_aux_loss_coef`; it never writes one.
BALANCE_WEIGHT = 0.001


class Adapter:
    """Drawn parameters by their names in the file, put on a model's modules."""

    def __init__(self, model, settings):
        rank, alpha = settings["r"], settings["lora_alpha"]
        if "expert_lora" in settings:
            rank, alpha = settings["expert_lora"]["r"], settings["expert_lora"]["lora_alpha"]
        self.model, self.rank = model, rank
        self.scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        # Of each block the balance loss of the last forward pass.
        self.parameters, self.balance = {}, {}
        self.generator = torch.Generator().manual_seed(3)

    def draw(self, name, *shape, size=0.2):
        values = size * torch.randn(*shape, generator=self.generator)
        self.parameters[name] = Parameter(values)
        return self.parameters[name]

    def factors(self, name, module, down=".lora_A", up=".lora_B"):
        return (
            self.draw(f"{name}{down}.weight", self.rank, module.in_features),
            self.draw(f"{name}{up}.weight", module.out_features, self.rank),
        )

    def low_rank(self, factors, x):
        a, b = (factor.to(x.dtype) for factor in factors)
        return self.scale * linear(linear(x, a), b)

    def modules(self, targets):
        """Path in a block and module, block by block."""
        for i, block in enumerate(self.model.model.layers):
            for target in targets:
                part = "self_attn" if target in ATTENTION else "mlp"
                module = getattr(getattr(block, part), target)
                yield f"layers.{i}.{part}.{target}", module

    def add(self, module, delta):
        module.register_forward_hook(lambda _, inputs, output: output + delta(inputs[0]))


def plain(adapter, targets):
    for path, module in adapter.modules(targets):
        factors = adapter.factors(f"base_model.model.model.{path}", module)
        adapter.add(module, lambda x, f=factors: adapter.low_rank(f, x))


def hydra(adapter, targets, heads):
    """softmax(R x) over heads that share A."""
    for path, module in adapter.modules(targets):
        name = f"base_model.model.model.{path}"
        route = adapter.draw(f"{name}.lora_route.weight", heads, module.in_features)
        down = adapter.draw(f"{name}.lora_A.weight", adapter.rank, module.in_features)
        ups = [
            adapter.draw(f"{name}.lora_B{i}.weight", module.out_features, adapter.rank)
            for i in range(heads)
        ]

        def delta(x, route=route, down=down, ups=ups):
            weights = linear(x, route.to(x.dtype)).softmax(-1)
            return sum(
                weights[..., i, None] * adapter.low_rank((down, up), x) for i, up in enumerate(ups)
            )

        adapter.add(module, delta)


def mixture(adapter, targets, prefix, experts, top_k):
    """LoRAMoE (all experts) and MoLA (the likeliest, weights renormalised), map by map."""
    for path, module in adapter.modules(targets):
        name = f"{prefix}.{path}"
        gate = adapter.draw(f"{name}.moe_gate.weight", experts, module.in_features)
        pool = [adapter.factors(f"{name}.experts.{e}", module) for e in range(experts)]

        def delta(x, gate=gate, pool=pool):
            weights = linear(x, gate.to(x.dtype)).softmax(-1)
            top, chosen = weights.topk(top_k, -1)
            kept = torch.zeros_like(weights).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
            return sum(kept[..., e, None] * adapter.low_rank(f, x) for e, f in enumerate(pool))

        adapter.add(module, delta)


def mix_lora(adapter, targets, experts, top_k, mask):
    """Every expert is the block's FFN with LoRAs of its own; plain LoRAs on the attention."""
    for path, module in adapter.modules([t for t in targets if t in ATTENTION]):
        factors = adapter.factors(f"mixlora.{path}", module)
        adapter.add(module, lambda x, f=factors: adapter.low_rank(f, x))
    for i, block in enumerate(adapter.model.model.layers):
        name, ffn = f"mixlora.layers.{i}.mlp", block.mlp
        gate = adapter.draw(f"{name}.moe_gate.weight", experts, ffn.gate_proj.in_features)
        pool = {
            (t, e): adapter.factors(f"{name}.{t}.experts.{e}", getattr(ffn, t))
            for t in targets if t in FFN for e in range(experts)
        }

        def forward(x, name=name, ffn=ffn, gate=gate, pool=pool):
            def project(target, e, x):
                out = getattr(ffn, target)(x)
                own = pool.get((target, e))
                return out if own is None else out + adapter.low_rank(own, x)

            weights = linear(x, gate.to(x.dtype)).softmax(-1)
            top, chosen = weights.topk(top_k, -1)
            picked = torch.zeros_like(weights).scatter(-1, chosen, 1.0)
            kept = torch.zeros_like(weights).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
            valid = mask.bool()
            share, probability = picked[valid].mean(0), weights[valid].mean(0)
            adapter.balance[name] = experts * (share * probability).sum()
            return sum(
                kept[..., e, None] * project(
                    "down_proj", e,
                    ffn.act_fn(project("gate_proj", e, x)) * project("up_proj", e, x),
                )
                for e in range(experts)
            )

        ffn.forward = forward


def moe_peft(kind, targets, rank, alpha, **more):
    """What MoE-PEFT exports for every adapter."""
    return dict(
        bias="none", peft_type=kind, r=rank, lora_alpha=alpha, lora_dropout=0.05,
        target_modules=targets, base_model_name_or_path="", task_type="CAUSAL_LM", **more,
    )


def expert(rank, alpha):
    return dict(bias="none", r=rank, lora_alpha=alpha, lora_dropout=0.05)


CASES = {
    "moe_peft_lora": moe_peft("LORA", ["q_proj", "up_proj"], 2, 5),
    "moe_peft_lora_rslora": moe_peft("LORA", ["o_proj", "down_proj"], 3, 2, use_rslora=True),
    "hydra_lora": dict(
        peft_type="LORA", r=2, lora_alpha=6, lora_nums=3, lora_dropout=0.05, blc_alpha=0.0,
        blc_weight=0.0, bias="none", enable_lora=None, fan_in_fan_out=False, merge_weights=False,
        modules_to_save=None, inference_mode=True, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"], base_model_name_or_path="",
    ),
    "loramoe": moe_peft(
        "LORAMOE", FFN, 2, 5, routing_strategy="loramoe", num_experts=3,
    ),
    "mola": moe_peft(
        "MOLA", ["v_proj", *FFN], 2, 5, routing_strategy="mola", num_experts=4, top_k=2,
    ),
    "mola_rslora": moe_peft(
        "MOLA", ["k_proj", "down_proj"], 3, 2, routing_strategy="mola", num_experts=3, top_k=2,
        use_rslora=True,
    ),
    "mix_lora": moe_peft(
        "MIXLORA", FFN, 2, 5, routing_strategy="mixlora", num_experts=3, top_k=2,
    ),
    "mix_lora_attention": moe_peft(
        "MIXLORA", ["q_proj", "o_proj", *FFN], 2, 5, routing_strategy="mixlora", num_experts=4,
        top_k=2, expert_lora=expert(2, 5),
    ),
    "mix_lora_some": moe_peft(
        "MIXLORA", ["v_proj", "up_proj", "down_proj"], 3, 4, routing_strategy="mixlora",
        num_experts=3, top_k=1, use_rslora=True,
    ),
}
SWITCHED = CASES["mix_lora"] | dict(target_modules=["q_proj", *FFN])

# On recorded mistral where not said otherwise.
REFUSED = {
    "use_dora__moe_peft": CASES["moe_peft_lora"] | dict(use_dora=True),
    "use_dora__mix_lora": CASES["mix_lora"] | dict(use_dora=True),
    "routing_strategy__dynamic": CASES["mix_lora"] | dict(routing_strategy="mixlora-dynamic"),
    "expert_lora__rank": SWITCHED | dict(expert_lora=expert(4, 5)),
    "act_fn__relu": CASES["mix_lora"] | dict(act_fn="relu"),
    "LORAMOE__attention": CASES["loramoe"] | dict(target_modules=["q_proj", *FFN]),
    # Recorded llama has biases in its FFN.
    "bias__mix_lora_llama": CASES["mix_lora"],
}


def put(adapter, settings, mask):
    """The adapter that the settings describe, on the model."""
    kind, targets = settings["peft_type"], settings["target_modules"]
    experts = settings.get("num_experts")
    if "lora_nums" in settings:
        hydra(adapter, targets, settings["lora_nums"])
    elif kind == "LORA":
        plain(adapter, targets)
    elif kind == "MIXLORA":
        mix_lora(adapter, targets, experts, settings["top_k"], mask)
    else:
        mixture(adapter, targets, kind.lower(), experts, settings.get("top_k", experts))


def save(folder, family, settings, values):
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, settings)
    name_base(folder, RECORDED / family)
    torch.save(values, folder / "adapter_model.bin")


def make(folder, family, name):
    settings = dict(CASES[name])
    model = load_base(RECORDED / family)
    inputs = batch(model.config.vocab_size)
    plain_logits = logits_of(model, inputs)
    if name == "mix_lora_some":
        settings["act_fn"] = "gelu_pytorch_tanh" if family == "gemma2" else "silu"
    adapter = Adapter(model, settings)
    put(adapter, settings, inputs["attention_mask"])
    # MoE-PEFT saves parameters, HydraLoRA's PEFT what is in them.
    hydra_lora = "lora_nums" in settings
    values = {n: p.detach() if hydra_lora else p for n, p in adapter.parameters.items()}
    save(folder, family, settings, values)
    # LoRAMoE and MoLA become S'MoREs, whose parameters are others.
    trained = settings["peft_type"] not in ["LORAMOE", "MOLA"]
    balanced = settings["peft_type"] == "MIXLORA"
    record(
        folder, model, adapter.parameters, plain_logits, gradients=trained,
        balance=(lambda: BALANCE_WEIGHT * sum(adapter.balance.values())) if balanced else None,
    )


def make_refused(folder, settings):
    family = "llama" if folder.name.endswith("llama") else "mistral"
    model = load_base(RECORDED / family)
    adapter, inputs = Adapter(model, settings), batch(model.config.vocab_size)
    put(adapter, settings, inputs["attention_mask"])
    save(folder, family, settings, dict(adapter.parameters))
    save_file(inputs, folder / "fixture.safetensors")
    print(f"to be refused: {folder.name}")


def families(name):
    return ["gemma2", "mistral", "qwen3"] if name.startswith("mix_lora") else ["gemma2", "llama"]


if __name__ == "__main__":
    cases, refused = map(Path, sys.argv[1:])
    for name in CASES:
        for family in families(name):
            make(cases / f"{family}__{name}", family, name)
    for name, settings in REFUSED.items():
        make_refused(refused / name, settings)
