"""Engines with and without compression on one GPU, with dummy weights; a part of ``run.py``.

    python benchmarks/gpu/decode.py --case CASE --output FILE [--budget 2048] [--seconds 200]

Model runner V2, vLLM's own choice of attention backend, async scheduling and prefix caching; full
CUDA graphs. Engines that share the card take turns, a slice of decode steps each; the others run
one after another. Where an engine refuses to start or fails, that is its result.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from operator import mul, truediv
from pathlib import Path
from statistics import median
from typing import Any

import engine as engines
import torch
from gpu.cases import (
    BLOCK_SIZE,
    GIB,
    HEAD_START,
    INTERVAL,
    Backlog,
    Case,
    Load,
    Side,
    Size,
    all_cases,
    size_for,
)
from gpu.report import conditions
from gpu.sides import EAGER, WAY_NAMES, ended_after, last_lines, line_of_start, start_sides
from reporting import spread, write_json
from tiny_model import write_tokenizer

Json = dict[str, Any]
Sides = dict[str, engines.SideProcess]
SLICE_STEPS = 32
# Of a backlog, for its first requests: their prompts are read, at the least.
LEAST_FILL_S = 25.0
LEAST_SERVE_S = 5.0


class Report:
    """What was found until now, in a file."""

    def __init__(self, output: Path, found: Json) -> None:
        self.output = output
        self.found = found | {"starts": [], "results": [], "backlogs": {}, "skipped": []}
        output.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """As far as it is."""
        write_json(self.output, self.found)

    def skip(self, what: Json, status: str, reason: str) -> None:
        """Something that is not measured: ``no room``, ``no time`` or ``failed``."""
        self.found["skipped"].append({**what, "status": status, "reason": reason})
        self.write()
        print(f"{status}: {what}: {reason}", flush=True)

    def add_load(self, load: Load, measured: Json) -> Json:
        """Of some sides, beside what others had under the same load."""
        same = [
            result
            for result in self.found["results"]
            if Load(result["context"], result["num_requests"], result["budget"]) == load
        ]
        if not same:
            self.found["results"].append(asdict(load))
            same = self.found["results"][-1:]
        result: Json = same[0]
        result |= measured
        if {"full", "compressed"} <= result.keys():
            rates = [result[name]["tokens_per_s"] for name in ("compressed", "full")]
            result["speedup"] = rates[0] / rates[1]
            slices = [result[name]["slice_s"] for name in ("full", "compressed")]
            result["slice_speedup"] = spread(list(map(truediv, *slices)))
        self.write()
        return result


def measure(sides: Mapping[str, engines.SideProcess], num_steps: int, load: Load) -> Json:
    """One load on the sides: prefill one after the other, then decode in turns."""
    slices: dict[str, list[Json]] = {name: [] for name in sides}
    prefills = {
        name: side.send(
            {"call": "prefill", **asdict(load), "answer_tokens": num_steps + HEAD_START}
        )
        for name, side in sides.items()
    }
    for slice_idx in range(num_steps // SLICE_STEPS):
        in_turn = list(sides) if slice_idx % 2 == 0 else list(reversed(sides))
        for name in in_turn:
            slices[name].append(sides[name].send({"call": "decode", "num_steps": SLICE_STEPS}))
    result: Json = {}
    for name, side in sides.items():
        slice_s = [sum(part["seconds"]) for part in slices[name]]
        result[name] = engines.summary(slices[name]) | {
            "tokens_per_s": load.num_requests * num_steps / sum(slice_s),
            "slice_s": slice_s,
            "prefill": prefills[name],
            "held_at_the_end": side.send({"call": "finish"})["held"],
        }
    return result


def measure_backlog(
    process: engines.SideProcess, backlog: Backlog, side: Side, fill_s: float, serve_s: float
) -> Json:
    """Fill an engine, for so long at most, then serve."""
    fill = {
        "total": backlog.total,
        "prompt": backlog.prompt,
        "most_prompt": side.most_prompt,
        "num_waiting": backlog.num_waiting,
        "mean_held": side.mean_held or (backlog.total + backlog.prompt) // 2,
        "seconds": fill_s,
    }
    filled = process.send({"call": "fill", **fill})
    served = process.send({"call": "serve", "seconds": serve_s})
    ended = process.send({"call": "finish"})
    found = {"filled": filled, "serve_s": serve_s} | summary_of(served)
    return found | {"held_at_the_end": ended["held"]}


def summary_of(served: Json) -> Json:
    """Tokens per second, over all steps and over those that only decoded; the time of a token of a
    request over all of them; what rounds took; peaks; and what ran and was held at some two hundred
    moments.
    """
    seconds, running = served["seconds"], served["running"]
    batches = zip(*(served[n] for n in ("seconds", "tokens", "computed", "requests")), strict=True)
    decoding = [(s, tokens) for s, tokens, computed, requests in batches if computed <= requests]
    elapsed, moments = 0.0, []
    every = max(1, len(seconds) // 200)
    for idx, found in enumerate(zip(seconds, running, served["held"], strict=True)):
        elapsed += found[0]
        if idx % every == 0:
            moments.append([elapsed, *found[1:]])
    spent = sum(s for s, _ in decoding)
    each_token = [1e3 * s for s, n in zip(seconds, served["tokens"], strict=True) for _ in range(n)]
    rounds = served["rounds"]
    tpot, round_ms = None, None
    if len(each_token) > 1:
        tpot = {"p50": median(each_token), "p99": engines.percentile(each_token, 99)}
    if rounds:
        round_ms = spread([1e3 * s for s in rounds])
    return {
        "steps": len(seconds),
        "tokens_per_s": sum(served["tokens"]) / elapsed if seconds else 0.0,
        "decoded_per_s": sum(tokens for _, tokens in decoding) / spent if spent else None,
        "step_ms": spread([1e3 * s for s, _ in decoding]) if decoding else None,
        "tpot_ms": tpot,
        "rounds": len(rounds),
        "round_ms": round_ms,
        "rounds_share": sum(rounds) / elapsed if seconds else 0.0,
        "most_running": max(running, default=0),
        "mean_running": sum(map(mul, seconds, running)) / elapsed if seconds else 0.0,
        "most_blocks_held": max(served["held"], default=0),
        "preemptions": served["preemptions"],
        "device_used_bytes": served["device_used_bytes"],
        "moments": {"columns": ["seconds", "running", "blocks held"], "rows": moments},
    }


def run_case(
    size: Size,
    folder: Path,
    report: Report,
    logs: Path,
    began: float,
    seconds: float,
    usual_ways: Sequence[str],
) -> None:
    """Every side of a case, those with compression first; what fails leaves the others their
    results. Sides with a backlog serve equally long.

    usual_ways: of starting them, in turn, unless the case knows better.
    """
    case = size.case
    requests: dict[str, Json] = {
        name: {
            "model": str(folder),
            "arguments": engine_arguments(size) | side.arguments,
            "settings": side.settings,
        }
        for name, side in sorted(case.sides.items(), key=lambda own: own[1].settings is None)
    }
    groups = [list(requests)] if case.together else [[name] for name in requests]
    ways = [EAGER] if case.eager else list(usual_ways)
    end = began + seconds
    serve_s: float | None = None
    for idx, names in enumerate(groups):
        left = end - time.monotonic()
        num_after = len(groups) - idx - 1
        share = left / (1 + num_after)
        if left < 20:
            report.skip({"sides": names}, "no time", f"{seconds:.0f} s were over")
            continue
        with ExitStack() as stack:
            chosen = {name: requests[name] for name in names}
            sides, starts = start_sides(stack, chosen, ways, logs, 0.6 * share / len(names), end)
            report.found["starts"] += starts
            report.write()
            # Sides are compared, so all run in the way of the first.
            ways = [starts[-1]["way"]] if sides else ways
            print("\n".join(map(line_of_start, starts)), flush=True)
            start_s = sum(start["start_s"] for start in starts if start["status"] == "started")
            try:
                for place, (name, side) in enumerate(sides.items() if case.backlog else ()):
                    assert case.backlog is not None
                    num_sides = len(sides) - place + num_after * len(names)
                    own_s = (end - time.monotonic() - num_after * start_s) / num_sides
                    if serve_s is None:
                        serve_s = max(0.0, min(case.backlog.seconds, own_s - LEAST_FILL_S))
                    fill_s = own_s - serve_s
                    least_serve_s = min(LEAST_SERVE_S, case.backlog.seconds)
                    if serve_s < least_serve_s or fill_s < LEAST_FILL_S / 2:
                        reason = f"{own_s:.0f} s are left to fill it and to serve"
                        report.skip({"sides": [name]}, "no time", reason)
                        continue
                    with ended_after(side, own_s + 10.0):
                        one_backlog(report, case, name, side, fill_s, serve_s)
                if case.loads and sides:
                    all_loads(report, size, sides, began, seconds)
            except (RuntimeError, BrokenPipeError) as error:
                said = {name: last_lines(logs / f"engine-{name}.log") for name in sides}
                report.skip({"sides": names, "log": said}, "failed", f"an engine ended: {error}")


def one_backlog(
    report: Report,
    case: Case,
    name: str,
    process: engines.SideProcess,
    fill_s: float,
    serve_s: float,
) -> None:
    """A side's part of the report, and its line."""
    assert case.backlog is not None
    found = measure_backlog(process, case.backlog, case.sides[name], fill_s, serve_s)
    report.found["backlogs"][name] = found
    report.write()
    print(
        f"{name:<14} {found['tokens_per_s']:>8.0f} tokens/s, {found['mean_running']:.1f} running"
        f" (at most {found['most_running']}), {found['preemptions']} preemptions,"
        f" {found['most_blocks_held']} blocks",
        flush=True,
    )


def all_loads(report: Report, size: Size, sides: Sides, began: float, seconds: float) -> None:
    """Every load that fits and begins in time."""
    for load in size.case.loads:
        skipped = skipped_reason(load, size, began, seconds)
        if skipped is not None:
            report.skip({**asdict(load), "sides": list(sides)}, *skipped)
            continue
        with ExitStack() as stack:
            for side in sides.values():
                stack.enter_context(ended_after(side, seconds))
            result = report.add_load(load, measure(sides, size.num_steps, load))
        print(line_of(result, list(sides)), flush=True)


def run(
    case: Case,
    output: Path,
    num_steps: int,
    seconds: float,
    commit: str | None,
    memory: int,
    ways: Sequence[str],
) -> Json:
    """Start, measure every load that fits and begins within ``seconds``, write after each."""
    began = time.monotonic()
    size = size_for(case, memory, num_steps)
    found: Json = {"conditions": conditions("cuda", commit), "case": asdict(case)}
    found |= {"num_steps": num_steps, "pool_bytes": size.pool_bytes}
    report = Report(output, found)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(case.shape.config), encoding="utf-8")
        write_tokenizer(folder, 512)
        run_case(size, folder, report, output.parent, began, seconds, ways)
    return report.found


def engine_arguments(size: Size) -> Json:
    """The same on all sides. ``gpu_memory_utilization`` is what must be free at the start; the
    pool is given in bytes.
    """
    return {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": size.pool_bytes,
        "gpu_memory_utilization": 0.3,
        "max_model_len": size.max_model_len,
        "max_num_seqs": size.case.max_num_seqs,
        "max_num_batched_tokens": size.case.max_num_batched_tokens,
        "disable_log_stats": True,
    }


def skipped_reason(load: Load, size: Size, began: float, seconds: float) -> tuple[str, str] | None:
    """Status and reason of a load that is not measured, or None."""
    needed = size.needed_bytes(load)
    if needed > size.pool_bytes:
        return "no room", (
            f"full attention needs {needed / GIB:.1f} GiB of KV cache, the pool has"
            f" {size.pool_bytes / GIB:.1f}"
        )
    if time.monotonic() - began > seconds:
        return "no time", f"{seconds:.0f} s were over; give more with --seconds"
    return None


def line_of(result: Json, names: list[str]) -> str:
    """One load for the table."""
    line = f"context {result['context']:>6}, {result['num_requests']:>2} requests:"
    line += f" budget {result['budget']}," if result["budget"] else ""
    for name in names:
        own = result[name]
        line += f" {name} {own['tokens_per_s']:.0f} tokens/s,"
        line += f" {own['step_ms']['median']:.2f} ms a step without rounds,"
        line += f" {own['most_blocks_held']} blocks;"
        if own["rounds"]:
            line += f" {own['round_ms']['median']:.2f} ms a round;"
    if "speedup" in result:
        line += f" {result['speedup']:.2f}x tokens/s"
    return line


def exit_code(found: Json, case: Case) -> int:
    """0 where all was measured on every side, 3 where compression was refused, 1 where an engine
    failed or did not start, 4 where time was over before all was measured. What had no room is a
    result: a load, or full attention beside compression.
    """
    last = {started["name"]: started["status"] for started in found["starts"]}
    if "refused" in last.values():
        return 3
    skipped = {one["status"] for one in found["skipped"]}
    compressed = {name for name, side in case.sides.items() if side.settings is not None}
    may_lack_room = set(case.sides) - compressed if compressed else set()
    for name in case.sides:
        status = last.get(name, "not begun")
        if status == "failed" or (status == "no room" and name not in may_lack_room):
            return 1
    if "failed" in skipped:
        return 1
    measured = set(found["backlogs"]).union(*found["results"])
    wanted = {name for name in case.sides if last.get(name) != "no room"}
    return 0 if "no time" not in skipped and wanted <= measured else 4


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=all_cases(2048), default="batches")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--sides", nargs="+", help="of the case; default: all of them")
    parser.add_argument("--ways", nargs="+", choices=WAY_NAMES, default=[*WAY_NAMES])
    parser.add_argument("--layers", type=int, help="fewer than the model's, for a smaller card")
    parser.add_argument("--intervals", type=int, default=3, help=f"of {INTERVAL} decode steps each")
    parser.add_argument("--seconds", type=float, default=200.0, help="nothing begins after these")
    parser.add_argument("--commit", help="what is measured, where this is not a git clone")
    args = parser.parse_args()
    case = all_cases(args.budget, args.layers)[args.case]
    try:
        case = case.only(args.sides or list(case.sides))
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use")
    memory = torch.cuda.get_device_properties(0).total_memory
    steps = args.intervals * INTERVAL
    ways = [WAY_NAMES[name] for name in args.ways]
    report = run(case, args.output, steps, args.seconds, args.commit, memory, ways)
    raise SystemExit(exit_code(report, case))


if __name__ == "__main__":
    main()
