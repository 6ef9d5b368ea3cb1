"""Scores the sets' choices with transformers and holds them against `smore eval`'s samples.

Contexts are laid out here anew from the published records, one sequence at a time, without a batch.
"""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-3


def records(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def commonsense_qa(record):
    question = record["question"]
    lines = [f"{c['label']}. {c['text']}\n" for c in question["choices"]]
    context = f"Question: {question['stem'].strip()}\n{''.join(lines)}Answer:"
    return [(context, f" {c['label']}") for c in question["choices"]]


def winogrande(record):
    at = record["sentence"].index("_")
    before, after = record["sentence"][:at], record["sentence"][at + 1:]
    return [(before + record[o], " " + after.strip()) for o in ("option1", "option2")]


def instruction(name):
    def pairs(record):
        body = record["instruction"].split(": ", 1)[1]
        body = body[:body.rindex("Answer format:")]
        if name == "boolq":
            context = f"Question: {body.strip().rstrip('?')}?\nAnswer:"
            return [(context, " no"), (context, " yes")]
        word = "Solution" if name == "piqa" else "Answer"
        question, *choices = [p.strip() for p in re.split(rf"{word}\d:", body)]
        context = {"openbookqa": question, "social_iqa": f"Q: {question}\nA:"}.get(
            name, f"Question: {question}\nAnswer:")
        return [(context, f" {c}") for c in choices]
    return pairs


def score(model, tokenizer, context, continuation):
    space = context[len(context.rstrip()):]
    context = context.rstrip()
    ids = tokenizer(context + space + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    cut = max(0, len(ids) - model.config.max_position_embeddings)
    ids, start = ids[cut:], start - cut
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids)))


@torch.no_grad()
def main(model_dir, out, limit, sets):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for name, file in sets:
        own = {"commonsense_qa": commonsense_qa, "winogrande": winogrande}
        pairs = own.get(name) or instruction(name)
        expected = records(Path(file))
        path = out / name / "base" / f"samples_{name}.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == len(expected), f"{name}: {len(samples)} of {len(expected)} samples"
        worst, right, count = 0.0, 0, 0
        for record, sample in list(zip(expected, samples))[:limit]:
            want = [score(model, tokenizer, *pair) for pair in pairs(record)]
            assert len(want) == len(sample["resps"]), f"{name} {sample['doc_id']}: choices"
            apart = max(abs(a - b) for a, b in zip(want, sample["resps"]))
            assert apart < TOLERANCE, f"{name} {sample['doc_id']}: {want} {sample['resps']}"
            worst, count = max(worst, apart), count + 1
            right += sample["acc,none"]
        print(f"{name}: {len(samples)} samples as in the file, {count} scored anew, at most "
              f"{worst:.1e} apart, accuracy of these {right / count:.4f}", flush=True)


limit = int(sys.argv[3])
main(sys.argv[1], Path(sys.argv[2]), limit, [arg.split("=", 1) for arg in sys.argv[4:]])
