"""S'MoRE adapters that smore wrote, against the naming rules of the authors' format alone.

    python official_names.py ADAPTER..            each has all tensors of its settings, no others
    python official_names.py --same ADAPTER COPY  and both hold the same, bit for bit
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open

BLOCK = "base_model.model.model.layers.{}.{}"
MODULES = dict(
    q_proj="self_attn", k_proj="self_attn", v_proj="self_attn", o_proj="self_attn",
    gate_proj="mlp", up_proj="mlp", down_proj="mlp",
)
KEYS = """
    activation_position auto_mapping balance_loss_weight base_model_name_or_path bias dim_downproj_x
    exclude_modules expert_act_fn expert_dims gate_act_fn gate_arch gate_dims gate_type
    inference_mode init_method init_moe_weights is_shared_expert_pool layer_forward_mode
    layers_to_transform lora_alpha lora_scaling modules_to_save moe_arch moe_dropout num_active
    num_experts peft_type revision target_modules task_type
""".split()


def shapes_of_map(c, d_in, d_out):
    """Of one adapted map: every tensor's name and shape."""
    s, r, g = c["num_experts"], c["expert_dims"], c["gate_dims"]
    depth, linear = len(s), c["gate_arch"] == "linear" and c["gate_type"] != "noisy_topk"
    pool, down = c["is_shared_expert_pool"], c["dim_downproj_x"]
    down = down if down > 0 else d_in
    d = [0]
    for experts, rank in zip(s, r):
        d.append(experts * rank if pool else d[-1] + experts * rank)
    shapes = {"moe_W_final": [d_out, d[-1]], "moe_W_final_bias": [d_out]}
    shapes |= {"moe_downproj_x.weight": [down, d_in], "moe_downproj_x.bias": [down]}
    for l in range(depth):
        shapes[f"moe_A.{l}"], shapes[f"moe_A_bias.{l}"] = [s[l], r[l], d_in], [s[l], r[l]]
        shapes[f"moe_B.{l}"], shapes[f"moe_B_bias.{l}"] = [s[l], d[l + 1], r[l]], [s[l], d[l + 1]]
        if l > 0:
            shapes[f"moe_W.{l}"] = [d[l + 1], d[l]]
            shapes[f"moe_W_bias.{l}"] = [d[l + 1]]
        gate, view = f"moe_gate.{l}", down + sum(g[l + 1:])
        shapes[f"{gate}.keys"] = [s[l], view if linear else g[l]]
        if not linear:
            shapes[f"{gate}.mlp.0.weight"], shapes[f"{gate}.mlp.0.bias"] = [g[l], view], [g[l]]
            shapes[f"{gate}.mlp.2.weight"], shapes[f"{gate}.mlp.2.bias"] = [g[l], g[l]], [g[l]]
            if c["gate_act_fn"].startswith("prelu"):
                shapes[f"{gate}.mlp.1.weight"] = [1]
        if c["gate_type"] == "noisy_topk":
            shapes[f"{gate}.weight_noise.weight"] = [s[l], view]
        if c["expert_act_fn"].startswith("prelu"):
            shapes[f"moe_expert_act_param.{l}"] = [1]
    return shapes


def sizes(base):
    """Inputs and outputs of every module."""
    hidden, ffn = base["hidden_size"], base["intermediate_size"]
    head = base.get("head_dim") or hidden // base["num_attention_heads"]
    q, kv = base["num_attention_heads"] * head, base["num_key_value_heads"] * head
    return dict(
        q_proj=(hidden, q), k_proj=(hidden, kv), v_proj=(hidden, kv), o_proj=(q, hidden),
        gate_proj=(hidden, ffn), up_proj=(hidden, ffn), down_proj=(ffn, hidden),
    )


def tensors(folder):
    """Name to shape, dtype and bytes."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, f"{folder}: metadata {file.metadata()}"
        held = {name: file.get_tensor(name) for name in file.keys()}
    return {n: (list(t.shape), str(t.dtype), t.numpy().tobytes()) for n, t in held.items()}


def check(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config) == sorted(KEYS), f"{folder}: keys {set(config) ^ set(KEYS)}"
    assert config["peft_type"] == "HIER_MOE" and config["moe_arch"] == "smore"
    base = json.loads((folder / config["base_model_name_or_path"] / "config.json").read_text())
    expected = {}
    for block in config["layers_to_transform"] or range(base["num_hidden_layers"]):
        for module in config["target_modules"]:
            path = BLOCK.format(block, f"{MODULES[module]}.{module}")
            for name, shape in shapes_of_map(config, *sizes(base)[module]).items():
                expected[f"{path}.{name}"] = shape
    held = tensors(folder)
    assert held.keys() == expected.keys(), f"{folder}: {sorted(held.keys() ^ expected.keys())[:4]}"
    for name, (shape, dtype, data) in held.items():
        assert shape == expected[name], f"{folder}: {name} is {shape}, not {expected[name]}"
        assert dtype == "torch.float32", f"{folder}: {name} is {dtype}"
        if config["is_shared_expert_pool"] and name.split(".")[-2] in POOL:
            first = f"{name.rpartition('.')[0]}.0"
            assert data == held[first][2], f"{folder}: {name} is no copy of {first}"
    print(f"{folder.name}: {len(held)} tensors as the authors name and shape them")


POOL = ["moe_A", "moe_A_bias", "moe_B", "moe_B_bias"]


def same(a, b):
    assert tensors(a) == tensors(b), f"{a} and {b} hold different tensors"
    read = [json.loads((f / "adapter_config.json").read_text()) for f in (a, b)]
    different = [k for k in read[0].keys() | read[1].keys() if read[0].get(k) != read[1].get(k)]
    assert not different, f"{a} and {b} differ in {different}"
    print(f"{a.name}: read and written again, every tensor and key is the same")


if __name__ == "__main__":
    if sys.argv[1] == "--same":
        same(*map(Path, sys.argv[2:]))
    else:
        for folder in sys.argv[1:]:
            check(Path(folder))
