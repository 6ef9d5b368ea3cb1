"""Reads a run's event files with TensorBoard's own reader and holds them against metrics.jsonl."""

import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {"train/loss": "loss", "train/learning_rate": "learning_rate",
        "train/grad_norm": "grad_norm", "eval/loss": "eval_loss"}


def as_f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def main(run):
    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    count = 0
    for tag, key in TAGS.items():
        want = [(line["step"], as_f32(line[key])) for line in lines if key in line]
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert got == want, f"{tag}: {len(got)} values, expected {len(want)}; {got[:3]} {want[:3]}"
        count += len(got)
    print(f"TensorBoard's reader finds all {count} values of {run}")


main(Path(sys.argv[1]))
