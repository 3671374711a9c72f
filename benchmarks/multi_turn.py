"""Turn two of a chat with and without compression: prefix-cache hits and time to first token.

    python benchmarks/multi_turn.py [--tiny] [--output FILE]

Two engines with the same flags take turns with the same chats, in processes of their own. Turn two
sends the first prompt, the answer and a new message. Writes one JSON file with the conditions.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine import SideProcess, conditions, start_sides
from reporting import run_in_a_size, write_json
from tiny_model import write_tiny_model

Json = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """chats: (tokens of the first prompt, tokens of its answer); each ``num_chats`` times."""

    model: Json
    settings: Json
    chats: tuple[tuple[int, int], ...]
    message_tokens: int
    num_chats: int
    block_size: int
    pool_bytes: int
    max_num_batched_tokens: int

    @property
    def max_model_len(self) -> int:
        """Room for both turns of the longest chat."""
        return max(sum(chat) for chat in self.chats) + self.message_tokens + 64


NORMAL = Size(
    model={
        "num_layers": 8,
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "dtype": "bfloat16",
    },
    settings={"method": "triattention", "budget": 512, "interval": 128},
    chats=((256, 128), (256, 768), (1024, 128), (2048, 128)),
    message_tokens=64,
    num_chats=3,
    block_size=32,
    pool_bytes=256 << 20,
    max_num_batched_tokens=512,
)
TINY = Size(
    model={"num_layers": 2, "hidden_size": 128, "head_dim": 32},
    settings={"method": "triattention", "budget": 128, "interval": 32},
    chats=((64, 32), (64, 160)),
    message_tokens=20,
    num_chats=2,
    block_size=32,
    pool_bytes=8 << 20,
    max_num_batched_tokens=128,
)


def measure(sides: dict[str, SideProcess], size: Size, chat: tuple[int, int], seed: int) -> Json:
    """The same chats on both sides, in turns; a chat's prompt is new to both."""
    num_prompt, num_answer = chat
    generator = torch.Generator().manual_seed(seed)
    turns: dict[str, list[Json]] = {name: [] for name in sides}
    for chat_idx in range(size.num_chats):
        prompt = torch.randint(0, 256, (num_prompt,), generator=generator).tolist()
        message = torch.randint(0, 256, (size.message_tokens,), generator=generator).tolist()
        for name in list(sides) if chat_idx % 2 == 0 else list(reversed(sides)):
            side = sides[name]
            first = side.send({"call": "turn", "prompt": prompt, "answer_tokens": num_answer})
            history = prompt + first["answer"] + message
            turns[name].append(side.send({"call": "turn", "prompt": history, "answer_tokens": 4}))
    result: Json = {
        "prompt_tokens": num_prompt,
        "answer_tokens": num_answer,
        "second_prompt_tokens": num_prompt + num_answer + size.message_tokens,
    }
    for name, own in turns.items():
        result[name] = {
            "hit_tokens": [turn["hit_tokens"] for turn in own],
            "first_token_ms": sorted(turn["first_token_seconds"] * 1e3 for turn in own),
        }
    return result


def markdown_table(report: Json) -> str:
    """The figures of a report as the documents show them: medians, tokens and milliseconds."""
    rows = [
        "| prompt + answer of turn one | prompt of turn two | hits, full | compressed "
        "| computed, full | compressed | first token, full | compressed |",
        f"|{' --- |' * 8}",
    ]
    for result in report["results"]:
        total = result["second_prompt_tokens"]
        sides = [result[name] for name in ("full", "compressed")]
        hits = [median(side["hit_tokens"]) for side in sides]
        first = [f"{median(side['first_token_ms']):.0f} ms" for side in sides]
        rows.append(
            f"| {result['prompt_tokens']} + {result['answer_tokens']} | {total} "
            f"| {hits[0]} | {hits[1]} | {total - hits[0]} | {total - hits[1]} "
            f"| {first[0]} | {first[1]} |"
        )
    return "\n".join(rows)


def run(size: Size, output: Path) -> None:
    """Measure every chat and write ``output``."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = write_tiny_model(Path(folder, "model"), **size.model)
        sides, described = start_sides(stack, model, size, variants={})
        results = [measure(sides, size, chat, seed) for seed, chat in enumerate(size.chats)]
        report = {"conditions": conditions(size, described), "results": results}
    write_json(output, report)
    print(markdown_table(report))


if __name__ == "__main__":
    run_in_a_size(run, NORMAL, TINY, __doc__, "multi_turn")
