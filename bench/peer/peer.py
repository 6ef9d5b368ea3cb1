"""The work of `cargo xtask bench` in plain PyTorch, transformers and PEFT.

One JSON object a line comes in on stdin, one goes out on stdout. `prepare` builds a case and
answers {"ready": true}; `run` does it once and answers {"seconds": ...}; at the end of the input the
peak of resident memory goes out as {"peak_memory_bytes": ...}. One process holds one case, so that
the peak is that case's alone.
"""

import json
import resource
import sys
import time

import torch


def gemm(case):
    """y = x W^T, as a frozen linear does it."""
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(case["m"], case["k"]).to(dtype)
    w = torch.randn(case["n"], case["k"]).to(dtype)

    def run():
        with torch.no_grad():
            torch.nn.functional.linear(x, w)

    return run


def step(case):
    """A training step: forward, backward, clipping and AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = case["shape"]
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["blocks"],
        intermediate_size=shape["intermediate"],
        vocab_size=shape["vocabulary"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=4096,
        tie_word_embeddings=shape["tied"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, case["dtype"]))
    rank = case["lora_rank"]
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=case["targets"], lora_dropout=0.0
    )
    model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, shape["vocabulary"], (case["batch"], case["length"]))

    def run():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


CASES = {"gemm": gemm, "step": step}


def peak():
    """Most memory ever resident, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    work = None
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            case = request["prepare"]
            torch.set_num_threads(case["threads"])
            work = CASES[case["kind"]](case)
            answer = {"ready": True, "torch": torch.__version__}
        else:
            start = time.perf_counter()
            work()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)
    print(json.dumps({"peak_memory_bytes": peak()}), flush=True)


main()
