"""Full attention against compression on one GPU, with dummy weights of Qwen3-8B's shape; a part of
``run.py``.

Two engines share the card and take turns, a slice of decode steps each. Model runner V2, vLLM's own
choice of attention backend, async scheduling and prefix caching; full CUDA graphs. Dummy weights
give real speed and memory, and no text. Where compression is refused, the refusal is the result and
full attention is measured alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine as engines
import torch
from gpu.report import conditions

from triattention_vllm.tools.tiny_model import write_tokenizer

Json = dict[str, Any]
HERE = Path(__file__).parent
BLOCK_SIZE = 16
VOCAB_SIZE = 151_936
MAX_BATCHED_TOKENS = 8192
SLICE_STEPS = 32
# Tokens that the first request of a load generates while the last one is still prefilled.
HEAD_START = 128

RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}

# Tried in this order until an engine starts; each start that fails is part of the result.
WAYS: Mapping[str, Json] = {
    "compiled, full and piecewise graphs": {
        "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}
    },
    "not compiled, full graphs for decoding": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    },
    "eager": {"enforce_eager": True},
}


@dataclass(frozen=True)
class Load:
    """So many requests of one context length, decoding."""

    context: int
    num_requests: int


LOADS = (Load(8192, 8), Load(8192, 1), Load(8192, 32), Load(32_768, 8), Load(32_768, 1))
SETTINGS: Json = {"method": "triattention", "budget": 2048, "interval": 128, "window": 128}


def qwen3_8b(num_layers: int) -> Json:
    """Its configuration. Fewer than 36 layers for a quick start on a small card."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 151_645,
    }


def token_bytes(num_layers: int) -> int:
    """KV cache of one token."""
    return num_layers * 2 * 8 * 128 * 2


def weight_bytes(num_layers: int) -> int:
    """bf16 weights: embedding and output matrix, attention, MLP."""
    layer = 4096 * (2 * 32 * 128 + 2 * 8 * 128) + 3 * 4096 * 12_288
    return 2 * (2 * VOCAB_SIZE * 4096 + num_layers * layer)


@dataclass(frozen=True)
class Size:
    """What is measured on this card."""

    num_layers: int
    num_steps: int
    pool_bytes: int

    def needed_bytes(self, load: Load) -> int:
        """KV cache of full attention at the end of a load."""
        return needed_tokens(load, self.num_steps) * token_bytes(self.num_layers)

    @property
    def max_model_len(self) -> int:
        """Longest context that fits, and its answer."""
        fitting = [load.context for load in LOADS if self.needed_bytes(load) <= self.pool_bytes]
        return max(fitting) + self.num_steps + HEAD_START


def size_for(total_memory: int, num_layers: int, num_steps: int) -> Size:
    """With a KV cache for each engine of what the largest load needs, or of half of what two sets
    of weights and 8 GiB each for activations and graphs leave of the card. Raises ValueError where
    that is not enough for the smallest load.
    """
    largest = max(needed_tokens(load, num_steps) for load in LOADS) * token_bytes(num_layers)
    left = 0.92 * total_memory / 2 - weight_bytes(num_layers) - 8 * 2**30
    smallest = min(needed_tokens(load, num_steps) for load in LOADS) * token_bytes(num_layers)
    if left < smallest:
        raise ValueError(
            f"two engines of {num_layers} layers and {smallest / 2**30:.1f} GiB of KV cache each do"
            f" not fit in {total_memory / 2**30:.0f} GiB; give fewer with --layers"
        )
    return Size(num_layers, num_steps, int(min(largest, left)))


def needed_tokens(load: Load, num_steps: int) -> int:
    """Cached by full attention at the end of a load."""
    return load.num_requests * (load.context + num_steps + HEAD_START + 2 * BLOCK_SIZE)


@contextmanager
def side_process(log: Path, cache: Path) -> Iterator[engines.SideProcess]:
    """An engine's process, whose messages go to ``log``; ends with the block."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("TRIATTENTION_")},
        # The run is there to verify what is refused elsewhere until it has been verified.
        "TRIATTENTION_ALLOW_UNTESTED_VLLM": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **RUNNER,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRIATTENTION_CACHE": str(cache),
    }
    command = [sys.executable, str(HERE / "side.py")]
    pipe = subprocess.PIPE
    with log.open("a", encoding="utf-8") as messages:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=messages, text=True, env=environment
        )
        try:
            yield engines.SideProcess(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def last_lines(log: Path, num_lines: int = 12) -> list[str]:
    """What an engine said last."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]


def start(stack: ExitStack, name: str, request: Json, way: str, logs: Path) -> Json:
    """``{"status": "started", "side": ..., "engine": ...}``, ``refused`` with its reason, or
    ``failed`` with the engine's last words. The process ends with ``stack``.
    """
    log = logs / f"engine-{name}.log"
    arguments = request["arguments"] | WAYS[way]
    began = time.monotonic()
    own = ExitStack()
    side = own.enter_context(side_process(log, Path(request["model"], "statistics")))
    try:
        engine = side.send(request | {"arguments": arguments})
    except (RuntimeError, BrokenPipeError) as error:
        own.close()
        return {"status": "failed", "way": way, "reason": str(error), "log": last_lines(log)}
    if "refused" in engine:
        own.close()
        return {"status": "refused", "way": way, "reason": engine["refused"]}
    stack.push(own)
    seconds = time.monotonic() - began
    return {"status": "started", "way": way, "start_s": seconds, "engine": engine, "side": side}


def start_sides(stack: ExitStack, request: Json, logs: Path, report: Json) -> Json:
    """Full attention first; compression in the way in which that has started."""
    sides: Json = {}
    for way in WAYS:
        started = start(stack, "full", request | {"settings": None}, way, logs)
        side = started.pop("side", None)
        report["starts"].append({"name": "full", **started})
        if side is not None:
            sides["full"] = side
            break
    else:
        return sides
    started = start(stack, "compressed", request | {"settings": SETTINGS}, way, logs)
    side = started.pop("side", None)
    report["starts"].append({"name": "compressed", **started})
    if side is not None:
        sides["compressed"] = side
    return sides


def measure(sides: dict[str, engines.SideProcess], size: Size, load: Load) -> Json:
    """One load on the sides: prefill one after the other, then decode in turns."""
    slices: dict[str, list[Json]] = {name: [] for name in sides}
    result: Json = asdict(load)
    prefills = {
        name: side.send(
            {"call": "prefill", **asdict(load), "answer_tokens": size.num_steps + HEAD_START}
        )
        for name, side in sides.items()
    }
    for slice_idx in range(size.num_steps // SLICE_STEPS):
        in_turn = list(sides) if slice_idx % 2 == 0 else list(reversed(sides))
        for name in in_turn:
            slices[name].append(sides[name].send({"call": "decode", "num_steps": SLICE_STEPS}))
    for name, side in sides.items():
        left = side.send({"call": "finish"})["held"]
        assert left == 0, f"{left} blocks are still held after all requests ended"
        seconds = sum(sum(part["seconds"]) for part in slices[name])
        rate = load.num_requests * size.num_steps / seconds
        result[name] = engines.summary(slices[name]) | {"tokens_per_s": rate}
        result[name]["prefill"] = prefills[name]
    if "compressed" in result:
        result["speedup"] = result["compressed"]["tokens_per_s"] / result["full"]["tokens_per_s"]
    return result


def run(output: Path, num_layers: int, intervals: int, seconds: float, commit: str | None) -> Json:
    """Start, measure every load that fits and begins within ``seconds``, write after each."""
    began = time.monotonic()
    memory = torch.cuda.get_device_properties(0).total_memory
    size = size_for(memory, num_layers, intervals * SETTINGS["interval"])
    output.parent.mkdir(parents=True, exist_ok=True)
    report: Json = {"conditions": conditions("cuda", commit), "size": asdict(size)}
    report |= {"model": qwen3_8b(num_layers), "settings": SETTINGS}
    report |= {"starts": [], "results": [], "skipped": []}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(report["model"]), encoding="utf-8")
        write_tokenizer(folder, 512)
        request = {"model": str(folder), "arguments": engine_arguments(size)}
        sides = start_sides(stack, request, output.parent, report)
        write(report, output)
        for load in LOADS if "full" in sides else ():
            reason = skipped_reason(load, size, began, seconds)
            if reason is not None:
                report["skipped"].append({**asdict(load), "reason": reason})
                continue
            report["results"].append(measure(sides, size, load))
            write(report, output)
            print(line_of(report["results"][-1]), flush=True)
    write(report, output)
    return report


def engine_arguments(size: Size) -> Json:
    """The same on both sides. ``gpu_memory_utilization`` is what must be free at the start; the
    pool is given in bytes.
    """
    return {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": size.pool_bytes,
        "gpu_memory_utilization": 0.3,
        "max_model_len": size.max_model_len,
        "max_num_seqs": max(load.num_requests for load in LOADS),
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "disable_log_stats": True,
    }


def skipped_reason(load: Load, size: Size, began: float, seconds: float) -> str | None:
    """Why a load is not measured, or None."""
    needed = size.needed_bytes(load)
    if needed > size.pool_bytes:
        return (
            f"full attention needs {needed / 2**30:.1f} GiB of KV cache, the pool has"
            f" {size.pool_bytes / 2**30:.1f}"
        )
    if time.monotonic() - began > seconds:
        return f"{seconds:.0f} s were over; give more with --seconds"
    return None


def write(report: Json, output: Path) -> None:
    """As far as it is."""
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def line_of(result: Json) -> str:
    """One load for the table."""
    line = f"context {result['context']:>6}, {result['num_requests']:>2} requests:"
    for side in ("full", "compressed"):
        if side in result:
            own = result[side]
            line += f" {side} {own['tokens_per_s']:.0f} tokens/s,"
            line += f" {own['step_ms']['median']:.2f} ms a step without rounds,"
            line += f" {own['most_blocks_held']} blocks;"
    if "speedup" in result:
        line += f" {result['speedup']:.2f}x tokens/s"
    return line


def main() -> None:
    """Parse the command line and run. Ends with 1 unless both sides were measured, 3 where
    compression was refused.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--intervals", type=int, default=3, help="of 128 decode steps each")
    parser.add_argument("--seconds", type=float, default=200.0, help="no load begins after these")
    parser.add_argument("--commit", help="what is measured, where this is not a git clone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use")
    report = run(args.output, args.layers, args.intervals, args.seconds, args.commit)
    for started in report["starts"]:
        if started["status"] != "started":
            print(f"{started['name']} ({started['way']}) {started['status']}: {started['reason']}")
    statuses = {started["name"]: started["status"] for started in report["starts"]}
    raise SystemExit({"started": 0, "refused": 3}.get(statuses.get("compressed", "failed"), 1))


if __name__ == "__main__":
    main()
