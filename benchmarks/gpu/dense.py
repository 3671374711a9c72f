"""A compressed engine on this device against a float64 reference; a part of ``run.py``.

    python benchmarks/gpu/dense.py --output FILE [--seconds 120] [--ways compiled graphs eager]

A small dense model in two engines, one after the other, as in ``decode.py``: model runner V2, full
CUDA graphs, async scheduling, prefix caching. Checks: the same tokens below the trigger; ten rounds
of each request or more, whose survivors are the best by the reference's scores, and
log-probabilities that err no more than full attention's; no call that waits for the device beside
those of full attention; at most six kernels a round.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from dense_judge import Judge
from dense_reference import DenseReference
from gpu.checks import Check
from gpu.report import conditions
from gpu.sides import (
    COMPILED,
    EAGER,
    GRAPHS,
    WAY_NAMES,
    WAYS,
    engine_environment,
    last_lines,
    line_of_start,
    start_limit,
    too_late,
)
from observed_engine import Observed, Observer, start_engine, statistics_file
from reporting import write_json
from tiny_model import write_tiny_model
from triattention_kernels import (
    compact_triton,
    fill_holes_triton,
    score_triton,
    select_triton,
    statistics_triton,
)

from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Statistics

Json = dict[str, Any]
SETTINGS = {"budget": 128, "interval": 32, "window": 16}
PROMPTS = (50, 70, 90)
SHORT, LONG = 40, 480
WATCHED_STEPS = 96
START_SHARE = 0.3  # of the time, for an engine that takes longer than the least of its way
# Of a small model, from the start to the end of its answers: estimates with room.
LEAST_S = {COMPILED: 100.0, GRAPHS: 60.0, EAGER: 40.0}
LEAST_ROUNDS = 10
# bfloat16 errors of two engines, each the largest of some ten thousand.
ERROR_MARGIN, TOLERANCE = 1.5, 0.1
OURS = {
    name
    for module in (
        compact_triton,
        fill_holes_triton,
        score_triton,
        select_triton,
        statistics_triton,
    )
    for name in vars(module)
    if name.endswith("_kernel")
}


def prompts() -> list[list[int]]:
    """Random tokens that every tiny model has."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in PROMPTS]


def observe(model: str, compressed: bool, way: str, output: Path, length: int) -> None:
    """Runs in the engine's process: write what it did."""
    arguments: Json = {"enforce_eager": False, "dtype": "bfloat16", "max_model_len": 2048}
    on_gpu = torch.cuda.is_available()
    arguments |= {"max_num_seqs": 8, "max_num_batched_tokens": 2048} | WAYS[way]
    arguments |= {"block_size": 16, "gpu_memory_utilization": 0.3} if on_gpu else {}
    if way == COMPILED:
        # Else each engine chooses its own order of sums by timing, and numbers differ by rounding.
        own = {"inductor_compile_config": {"deterministic": True}}
        arguments["compilation_config"] = arguments["compilation_config"] | own
    settings = SETTINGS if compressed else None
    llm = start_engine(model, settings, **arguments)
    observer = Observer(llm)
    found: Json = {"block_size": observer.block_size}
    found["statistics"] = statistics_file(llm) if compressed else None
    for name, num_tokens in (("short", SHORT), ("long", length)):
        generate(llm, num_tokens)
        found[name] = observer.take()
    if on_gpu:
        found |= waits_and_kernels(llm)
    found["held"] = observer.num_held
    torch.save(found, output)


def generate(llm: Any, num_tokens: int) -> None:
    """All prompts at once, greedily."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=20, detokenize=False
    )
    llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)


def waits_and_kernels(llm: Any) -> Json:
    """Where steps waited for the device, by torch's own account, and how many kernels of ours ran;
    three intervals of each.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True, detokenize=False)
    engine.add_request("watched", {"prompt_token_ids": prompts()[0]}, params)
    for _ in range(4 * WATCHED_STEPS):
        engine.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(WATCHED_STEPS):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "called a synchronizing" in str(w.message)
    )
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(WATCHED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.abort_request(["watched"])
    kernels = Counter(event.name for event in seen.events() if event.name in OURS)
    return {"waits": dict(waits), "kernels": dict(kernels)}


def started(side: str, folder: Path, output: Path, way: str, seconds: float, length: int) -> Json:
    """One engine's process to its end: ``passed`` with what it saw, or ``failed`` with its last
    words.
    """
    log = output.parent / f"dense-{side}.log"
    result = folder / f"{side}.pt"
    command = [sys.executable, __file__, "--side", side, "--model", str(folder), "--way", way]
    command += ["--output", str(result), "--length", str(length)]
    with log.open("a", encoding="utf-8") as messages:
        try:
            code = subprocess.run(
                command,
                env=engine_environment(folder / "statistics"),
                stdout=messages,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
            reason = f"exit code {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"it did not end within {seconds:.0f} s, see {log.name}"
    if code != 0:
        return {"status": "failed", "way": way, "reason": reason, "log": last_lines(log)}
    found: Json = torch.load(result, map_location="cpu", weights_only=False)
    return {"status": "passed", "way": way, "found": found}


def judged(folder: Path, full: Json, compressed: Json, least_rounds: int) -> list[Check]:
    """What two engines did, against one another and the reference, each request in so many rounds
    or more."""
    dense = DenseReference(folder, rounded_to=torch.bfloat16)
    judge = Judge(
        dense,
        Statistics.load(compressed["statistics"]),
        Settings(**SETTINGS),
        compressed["block_size"],
        tolerance=TOLERANCE,
    )
    pairs = list(zip(full["short"], compressed["short"], strict=True))
    checks = [below_the_trigger(pairs)]
    rounding = max(error_of_full(dense, request) for request in full["long"])
    rounds = [request.num_rounds for request in compressed["long"]]
    try:
        error = max(judge.largest_error(request) for request in compressed["long"])
    except AssertionError as error_:
        checks.append(Check("rounds", False, str(error_)))
    else:
        words = f"{rounds} rounds, error {error:.3g}, full attention's {rounding:.3g}"
        right = error <= ERROR_MARGIN * rounding and min(rounds) >= least_rounds
        checks.append(Check("rounds", right, words))
    held = [side["held"] for side in (full, compressed)]
    checks.append(Check("blocks", held == [0, 0], f"{held} held at the end"))
    if "waits" in compressed:
        more = Counter(compressed["waits"]) - Counter(full["waits"])
        words = f"beside full attention's: {dict(more)}" if more else "none of its own"
        checks.append(Check("waiting for the device", not more, words))
        kernels = compressed["kernels"]
        num_batches = max(1, kernels.get("score_kernel", 0))
        each = sum(kernels.values()) / num_batches
        enough = 0 < each <= 6 and "score_kernel" in kernels
        checks.append(Check("kernels", enough, f"{each:.1f} a round, {num_batches} rounds"))
    return checks


def below_the_trigger(pairs: Sequence[tuple[Observed, Observed]]) -> Check:
    """Requests without rounds: the same tokens, and bit for bit the same numbers."""
    if any(full.token_ids != ours.token_ids for full, ours in pairs):
        return Check("below the trigger", False, "other tokens")
    positions = [
        place for full, ours in pairs for place in zip(full.logprobs, ours.logprobs, strict=True)
    ]
    if any(full.keys() != ours.keys() for full, ours in positions):
        return Check("below the trigger", False, "other tokens are among the likeliest")
    if all(full == ours for full, ours in positions):
        return Check("below the trigger", True, "identical")
    apart = max(abs(full[token] - ours[token]) for full, ours in positions for token in full)
    found = f"the same tokens, log-probabilities {apart:.3g} apart"
    return Check("below the trigger", False, found)


def error_of_full(dense: DenseReference, request: Observed) -> float:
    """Largest error of a log-probability, without any round."""
    exact = dense.logprobs(request.token_ids[:-1])
    return max(
        abs(float(exact[request.num_prompt - 1 + i, token]) - value)
        for i, position in enumerate(request.logprobs)
        for token, value in position.items()
    )


def run(output: Path, seconds: float, commit: str | None, length: int, ways: list[str]) -> Json:
    """Both engines in the first way in which both work, then the checks; written as far as it is.

    The one with compression is first: where it cannot work, the other need not be waited for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: Json = {"conditions": conditions(device, commit), "starts": [], "checks": []}
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_model(Path(name), dtype="bfloat16", num_layers=2)
        found: Json = {}
        for way in ways:
            found = {}
            for side in ("compressed", "full"):
                left = until - time.monotonic()
                others = [way] if found else ways
                limit = start_limit(way, others, left, START_SHARE * seconds, LEAST_S)
                start = too_late(way, left, LEAST_S)
                if limit is not None:
                    start = started(side, folder, output, way, limit, length)
                if "found" in start:
                    found[side] = start.pop("found")
                report["starts"].append({"name": side, **start})
                write_json(output, report)
                if side not in found:
                    break
            if len(found) == 2:
                break
        if len(found) == 2:
            least_rounds = LEAST_ROUNDS if length >= LONG else 1
            checks = judged(folder, found["full"], found["compressed"], least_rounds)
            report["checks"] = [asdict(check) for check in checks]
    write_json(output, report)
    return report


def main() -> None:
    """Parse the command line and run. Ends with 1 where a check failed, 2 where none was made, 4
    where all passed in engines that ran without CUDA graphs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--length", type=int, default=LONG, help="tokens of an answer")
    parser.add_argument("--ways", nargs="+", choices=WAY_NAMES, default=[*WAY_NAMES])
    parser.add_argument("--commit", help="what is checked, where this is not a git clone")
    parser.add_argument("--side", choices=("full", "compressed"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        observe(args.model, args.side == "compressed", args.way, args.output, args.length)
        return
    ways = [WAY_NAMES[name] for name in args.ways]
    report = run(args.output, args.seconds, args.commit, args.length, ways)
    print("\n".join(map(line_of_start, report["starts"])))
    for check in report["checks"]:
        print(f"{'ok   ' if check['passed'] else 'WRONG'} {check['name']}: {check['found']}")
    raise SystemExit(exit_code(report))


def exit_code(report: Json) -> int:
    """See ``main``."""
    if not report["checks"]:
        return 2
    if not all(check["passed"] for check in report["checks"]):
        return 1
    return 4 if report["starts"][-1]["way"] == EAGER else 0


if __name__ == "__main__":
    main()
