"""Put a trained model where the quality run, the tests and the demo look for it, with its card.

PYTHONPATH=benchmarks python -m quality.ship --folder RUN [--note TEXT]
"""

import argparse
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from quality.problems import calibration_text
from quality.tasks import machine

MODEL = Path(__file__).parent / "model"
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
Json = dict[str, Any]
CARD = """# A small reasoner

Qwen3's architecture (4 layers, hidden size 256, 4 query and 2 KV heads of 64), 2.4 million
parameters in bfloat16, 128 words, trained from scratch on this project's own synthetic tasks and
on nothing else. It solves the problems of `benchmarks/quality/tasks` step by step and knows no
language. Made to measure what KV-cache compression does to answers; see `docs/quality.md`.

- Made by `python -m quality.train --steps {steps} --seed {seed}`: {tokens} tokens, {seconds}
  seconds. `training.jsonl` is the log of every twenty steps: loss, and the share of graded words
  that were right, by task and length, on problems that were new at that moment, for each step's own
  weights; the model is their moving average.{note}
- `calibration.txt`: solved problems, for the statistics of `triattention`. `problems.jsonl`:
  programs with their traces, for `triattention demo`.
- Licence: that of the project. No data of others went into it.

Graded words right over the last {last} lines of the log, the words before them given:

| task / length | right |
| --- | --- |
{right}
"""
LAST_LINES = 10


def card(plan: Json, log: list[Json], note: str) -> str:
    """The model card, with the figures of the end of the log and what else is to be said."""
    found: dict[str, list[float]] = {}
    for line in log[-LAST_LINES:]:
        for name, share in line["right"].items():
            found.setdefault(name, []).append(share)
    rows = [f"| {name} | {sum(own) / len(own):.4f} |" for name, own in sorted(found.items())]
    last = log[-1]
    return CARD.format(
        steps=plan["steps"],
        seed=plan["seed"],
        note=f" {note}" if note else "",
        tokens=last["tokens"],
        seconds=last["seconds"],
        last=min(LAST_LINES, len(log)),
        right="\n".join(rows),
    )


def demo_problems() -> str:
    """Programs and their traces, for the demo: one JSON object a line."""
    lines = []
    for idx in range(16):
        problem = machine.generate(Random(f"demo {idx}"), 2048)
        words = {"prompt": problem.prompt, "answer": problem.answer.words}
        lines.append(json.dumps({name: " ".join(own) for name, own in words.items()}) + "\n")
    return "".join(lines)


def main() -> None:
    """Copy weights, tokenizer and log; write the calibration text and the card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the training")
    parser.add_argument("--note", default="", help="what the command does not say of this run")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    MODEL.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / "model" / name, MODEL / name)
    shutil.copyfile(folder / "log.jsonl", MODEL / "training.jsonl")
    (MODEL / "calibration.txt").write_text(calibration_text(), encoding="utf-8")
    (MODEL / "problems.jsonl").write_text(demo_problems(), encoding="utf-8")
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    text = card(plan, [json.loads(line) for line in lines], arguments.note)
    (MODEL / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
