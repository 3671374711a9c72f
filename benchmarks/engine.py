"""Full attention against compression in one run: step time, blocks, concurrency, round cost.

    python benchmarks/engine.py [--tiny] [--output FILE]

Engines with the same flags, one of full attention, one with compression and one with it but without
redundancy, run side by side in processes of their own and take turns, a slice of decode steps each,
so that whatever else the machine does meets all. Writes one JSON file with every figure and the
conditions it was taken under.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from reporting import run_in_a_size, spread, taken, write_json
from tiny_model import write_tiny_model

from triattention_vllm import __version__

HERE = Path(__file__).parent
Json = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured. pool_bytes must hold the largest full-attention load.

    variants: further settings of more engines, by name.
    """

    model: dict[str, Any]
    contexts: tuple[int, ...]
    num_requests: tuple[int, ...]
    settings: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    block_size: int
    pool_bytes: int
    max_num_batched_tokens: int
    intervals: int
    slice_steps: int

    @property
    def num_steps(self) -> int:
        """Decode steps per side and load: whole intervals, so that rounds count as they come."""
        return int(self.intervals * self.settings["interval"])

    @property
    def max_model_len(self) -> int:
        """Longest context and its answer."""
        return max(self.contexts) + self.num_steps + 64


NORMAL = Size(
    model={
        "num_layers": 8,
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "dtype": "bfloat16",
    },
    contexts=(2048, 8192, 16384),
    num_requests=(1, 4),
    settings={"method": "triattention", "budget": 2048, "interval": 128},
    variants={"without_redundancy": {"score_redundancy": 0}},
    block_size=128,
    pool_bytes=640 << 20,
    max_num_batched_tokens=2048,
    intervals=3,
    slice_steps=32,
)
TINY = Size(
    model={"num_layers": 2, "hidden_size": 128, "head_dim": 32},
    contexts=(256, 1024),
    num_requests=(1, 4),
    settings={"method": "triattention", "budget": 256, "interval": 32},
    variants={"without_redundancy": {"score_redundancy": 0}},
    block_size=32,
    pool_bytes=8 << 20,
    max_num_batched_tokens=512,
    intervals=2,
    slice_steps=16,
)


class SideProcess:
    """The driver's end of one ``engine_side.py``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.requests = process.stdin
        self.answers = process.stdout

    def send(self, request: Json) -> Json:
        """One question, one answer; raises RuntimeError where the engine has ended."""
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError(f"an engine ended with exit code {self.process.wait()}, see above")
        result: Json = json.loads(answer)
        return result


@contextmanager
def side_process(
    script: Path, environment: Mapping[str, str], messages: IO[str] | None = None
) -> Iterator[SideProcess]:
    """An engine's process, whose messages go to this one's or to ``messages``; ends with the
    block."""
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=messages,
        text=True,
        env=environment,
    )
    try:
        yield SideProcess(process)
    finally:
        assert process.stdin is not None
        try:
            process.stdin.close()
            process.wait(20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()


def start_sides(
    stack: ExitStack,
    model: Path,
    size: Any,
    variants: Mapping[str, Mapping[str, Any]],
    **more: Any,
) -> tuple[dict[str, SideProcess], Json]:
    """Full attention, compression and its variants with the same flags, and what the engines
    are."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("TRIATTENTION_ENABLE")},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = {
        "enforce_eager": True,
        "dtype": size.model.get("dtype", "float32"),
        "block_size": size.block_size,
        "kv_cache_memory_bytes": size.pool_bytes,
        "max_model_len": size.max_model_len,
        "max_num_batched_tokens": size.max_num_batched_tokens,
        "disable_log_stats": True,
        **more,
    }
    sides, described = {}, {}
    compressed = {name: size.settings | own for name, own in {"compressed": {}, **variants}.items()}
    for name, settings in {"full": None, **compressed}.items():
        sides[name] = stack.enter_context(side_process(HERE / "engine_side.py", environment))
        started = {"model": str(model), "arguments": arguments, "settings": settings}
        described = sides[name].send(started)
    return sides, described


def measure(sides: dict[str, SideProcess], size: Size, context: int, num_requests: int) -> Json:
    """One load on all sides: prefill one after the other, then decode in turns."""
    slices: dict[str, list[Json]] = {name: [] for name in sides}
    prefills = {}
    load = {"context": context, "num_requests": num_requests}
    for name, side in sides.items():
        answer_tokens = size.num_steps + 32
        prefills[name] = side.send({"call": "prefill", **load, "answer_tokens": answer_tokens})
    for slice_idx in range(size.num_steps // size.slice_steps):
        in_turn = list(sides) if slice_idx % 2 == 0 else list(reversed(sides))
        for name in in_turn:
            slices[name].append(sides[name].send({"call": "decode", "num_steps": size.slice_steps}))
    result: Json = dict(load)
    for name, side in sides.items():
        left = side.send({"call": "finish"})["held"]
        assert left == 0, f"{left} blocks are still held after all requests ended"
        result[name] = summary(slices[name]) | {"prefill": prefills[name]}
    return result


def summary(slices: Sequence[Json]) -> Json:
    """Times in milliseconds. ``tpot_ms`` is of all steps, which give each request a token,
    ``step_ms`` of those without rounds, if there are any. Two views of what rounds cost:
    ``round_ms`` is score, select and compact alone, timed inside the worker; ``extra_step_ms`` is
    what a step with rounds took above the median step without (with many requests every step may
    have one, and this is left out), everything included."""
    seconds = [s * 1e3 for part in slices for s in part["seconds"]]
    rounds = [[s * 1e3 for s in step] for part in slices for step in part["rounds"]]
    plain = [step for step, own in zip(seconds, rounds, strict=True) if not own]
    with_rounds = [step for step, own in zip(seconds, rounds, strict=True) if own]
    each_round = [cost for own in rounds for cost in own]
    figures: Json = {
        "step_ms": spread(plain or seconds),
        "tpot_ms": {"p50": median(seconds), "p99": percentile(seconds, 99)},
        "most_blocks_held": max(blocks for part in slices for blocks in part["held"]),
        "steps": len(seconds),
        "steps_with_rounds": len(with_rounds),
        "rounds": len(each_round),
    }
    if each_round:
        figures["round_ms"] = spread(each_round)
        if plain:
            figures["extra_step_ms"] = spread([step - median(plain) for step in with_rounds])
        figures["rounds_share_of_decode"] = sum(each_round) / sum(seconds)
    return figures


def percentile(values: Sequence[float], percent: int) -> float:
    """Between the two values that are nearest."""
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def compare(result: Json, pool_blocks: int) -> None:
    """Add what a pool of this size admits, and the ratio of the steps."""
    for name in ("full", "compressed"):
        held_each = result[name]["most_blocks_held"] / result["num_requests"]
        result[name]["requests_that_fit"] = int(pool_blocks / held_each)
    steps = [result[name]["step_ms"]["median"] for name in ("full", "compressed")]
    result["step_speedup"] = steps[0] / steps[1]


def conditions(size: Any, described: Json) -> Json:
    """Where and with what the figures of a run of ``size``, a dataclass, were taken."""
    return {
        **taken(),
        "triattention_vllm": __version__,
        "cores": os.cpu_count(),
        "engine": described,
        "size": asdict(size),
    }


def line_of(result: Json) -> str:
    """One load in one line for the terminal."""
    full, compressed = result["full"], result["compressed"]
    share = compressed.get("rounds_share_of_decode")
    rounds = "no round"
    if share is not None:
        cost = compressed["round_ms"]["median"]
        rounds = f"{compressed['rounds']} rounds of {cost:.1f} ms = {share:.1%} of decode"
    return (
        f"context {result['context']:>6}, {result['num_requests']} requests: step "
        f"{full['step_ms']['median']:.1f} -> {compressed['step_ms']['median']:.1f} ms, blocks "
        f"{full['most_blocks_held']} -> {compressed['most_blocks_held']}, fit "
        f"{full['requests_that_fit']} -> {compressed['requests_that_fit']}, {rounds}"
    )


def step_with_rounds(side: Json) -> float:
    """Milliseconds of a decode step with its share of the rounds: ``step / (1 - share)``."""
    step: float = side["step_ms"]["median"]
    return step / (1 - side.get("rounds_share_of_decode", 0.0))


def markdown_table(report: Json) -> str:
    """The figures of a report as the README shows them."""
    rows = [
        "| context x requests | prefill, full | compressed | decode step, full | compressed "
        "| with its rounds | rounds' share | blocks held, full | compressed |",
        f"|{' --- |' * 9}",
    ]
    for result in report["results"]:
        full, ours = result["full"], result["compressed"]
        rows.append(
            f"| {result['context'] // 1024}k x {result['num_requests']} "
            f"| {full['prefill']['seconds']:.1f} s | {ours['prefill']['seconds']:.1f} s "
            f"| {full['step_ms']['median']:.1f} ms | {ours['step_ms']['median']:.1f} ms "
            f"| {step_with_rounds(ours):.1f} ms | {ours['rounds_share_of_decode']:.1%} "
            f"| {full['most_blocks_held']} | {ours['most_blocks_held']} |"
        )
    return "\n".join(rows)


def measured_at(report: Json) -> str:
    """When, of what and with which lengths, as the documents say it beside the figures; a window
    that is not named is the default."""
    conditions, size = report["conditions"], report["conditions"]["size"]
    given = size.get("settings", size)
    lengths = [f"{name} {given[name]}" for name in ("interval", "window") if name in given]
    return ", ".join([conditions["date"][:10], f"commit {conditions['commit']}", *lengths])


def run(size: Size, output: Path) -> None:
    """Measure every load and write ``output``."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = write_tiny_model(
            Path(folder, "model"), max_position_embeddings=size.max_model_len, **size.model
        )
        sides, described = start_sides(
            stack, model, size, size.variants, max_num_seqs=max(size.num_requests)
        )
        results = []
        report = {"conditions": conditions(size, described), "results": results}
        for context in size.contexts:
            for num_requests in size.num_requests:
                result = measure(sides, size, context, num_requests)
                compare(result, described["pool_blocks"])
                results.append(result)
                print(line_of(result), flush=True)
    write_json(output, report)


if __name__ == "__main__":
    run_in_a_size(run, NORMAL, TINY, __doc__, "engine_cpu")
