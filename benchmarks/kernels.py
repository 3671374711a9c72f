"""Score, select, compact and row shift: time, bytes and percent of the bandwidth of a copy.

    python benchmarks/kernels.py [--tiny] [--output FILE]

The product's kernels, the torch triads and the plain alternative (per layer ``topk`` and
``index_select``) take turns on the same paged caches. Results are checked first: a side whose
results are wrong, or that is compared with wrong ones, gets no speed-up.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from gpu.checks import Check, check_all, check_movement, check_scores, check_selection
from gpu.fitting import all_keys_bytes, no_memory, no_time, num_request_sets
from gpu.plain import plain_operations
from gpu.report import HEADER, conditions, device_name, failures, lines_of, slug
from gpu.rounds import (
    MODE,
    MODELS,
    Model,
    Operations,
    RequestSet,
    make_request_sets,
    product_operations,
    round_shape,
)
from gpu.timing import Json, Times, copy_bandwidth, in_turns
from reporting import HERE, write_json
from torch import Tensor
from triattention_kernels.traffic import (
    RoundShape,
    Traffic,
    compact_traffic,
    fill_holes_traffic,
    score_traffic,
    select_traffic,
    shift_traffic,
)

PARTS_OF_A_ROUND = ("score", "select_redundancy", "compact")


@dataclass(frozen=True)
class Size:
    """What is measured, the most telling first.

    torch_requests: above these the torch triad, a Python loop over blocks, is not timed.
    """

    models: tuple[Model, ...] = MODELS
    budgets: tuple[int, ...] = (2048, 512, 8192)
    num_requests: tuple[int, ...] = (32, 1, 8, 64)
    num_turns: int = 20
    side_seconds: float = 0.2
    torch_requests: int = 8
    copied_bytes: int = 1 << 30


TINY = Size(
    models=(Model("tiny", 2, 4, 2, 32, dtype=torch.float32),),
    budgets=(192,),
    num_requests=(1, 2),
    num_turns=3,
    side_seconds=0.2,
    copied_bytes=8 << 20,
)


@dataclass(frozen=True)
class Sides:
    """The three that are compared. ``product`` is what runs on this device."""

    product: Operations
    torch: Operations | None
    plain: Operations


def default_sides(device: str) -> Sides:
    """On the CPU the torch triads are the product."""
    specification = product_operations("torch")
    if device == "cpu":
        return Sides(specification, None, plain_operations())
    return Sides(product_operations("triton"), specification, plain_operations())


def measure(
    model: Model, budget: int, num_requests: int, size: Size, sides: Sides, device: str
) -> Json:
    """One shape: check, then time every operation. Raises OutOfMemoryError."""
    shape = round_shape(model, budget, num_requests)
    result: Json = {"model": model.name, "budget": budget, "num_requests": num_requests}
    result["shape"] = asdict(shape) | {"mode": MODE, "dtype": str(model.dtype)}
    num_sets = num_request_sets(shape, device)
    sets = make_request_sets(shape, budget, model.dtype, num_sets, device)
    checks = {"product": check_all(sides.product, sets[0])}
    checks["plain"] = check_plain(sides, sets[0])
    if os.environ.get("TRITON_INTERPRET") == "1":
        checks["triton"] = check_all(product_operations("triton"), sets[0])
    result["checks"] = {name: [asdict(check) for check in found] for name, found in checks.items()}
    result["num_request_sets"] = num_sets
    traffic, calls = prepared(sides, sets, shape, size)
    bandwidth = copy_bandwidth(size.copied_bytes, device)
    result["copy_bytes_per_s"] = bandwidth
    failed = {
        name: {check.name for check in found if not check.passed} for name, found in checks.items()
    }
    result["operations"] = {
        name: operation_result(
            name,
            in_turns(own, size.num_turns, size.side_seconds, device),
            traffic.get(name),
            bandwidth,
            failed,
        )
        for name, own in calls.items()
    }
    result["round_us_per_request"] = (
        result["operations"]["round"]["product"]["device_us"]["median"] / num_requests
    )
    return result


def check_plain(sides: Sides, requests: RequestSet) -> list[Check]:
    """The plain alternative does the same work, or is no alternative."""
    indices = sorted({0, requests.batch.num_requests - 1})
    scores = sides.plain.score(requests)
    kept = sides.plain.select(requests, scores)
    return [
        check_scores(scores, requests, indices),
        check_selection(kept, scores, requests),
        check_selection(
            sides.plain.select_redundancy(requests, scores), scores, requests, with_redundancy=True
        ),
        check_movement(sides.plain, kept, requests, indices, "compact"),
    ]


Calls = dict[str, Callable[[int], object]]


def prepared(
    sides: Sides, sets: Sequence[RequestSet], shape: RoundShape, size: Size
) -> tuple[dict[str, Traffic], dict[str, Calls]]:
    """Bytes and, per side, the calls of every operation, on one set after the other.

    Bytes are those of the first round of a set. Later turns move its survivors again, among
    copies of them, and about as many.
    """
    scores = [sides.product.score(requests) for requests in sets]
    kept = [sides.product.select(r, s) for r, s in zip(sets, scores, strict=True)]
    traffic = {
        "score": score_traffic(shape),
        "select": select_traffic(shape, MODE),
        "select_redundancy": select_traffic(shape, MODE, with_redundancy=True),
        "compact": compact_traffic(shape, MODE, num_moved(kept[0])),
        "shift": shift_traffic(shape.num_requests, sets[0].num_null, sets[0].num_cached_blocks),
    }
    traffic["round"] = total_of(traffic[name] for name in PARTS_OF_A_ROUND)
    calls: dict[str, Calls] = {}
    named = {"product": sides.product, "plain": sides.plain}
    if sides.torch is not None and shape.num_requests <= size.torch_requests:
        named["torch"] = sides.torch
    for name in ("select", *PARTS_OF_A_ROUND, "round"):
        calls[name] = {
            side: operation_call(name, own, sets, scores, kept) for side, own in named.items()
        }
    named.pop("plain")
    if sides.product.fill_holes is not None:
        order = [sides.product.fill_holes(r, k) for r, k in zip(sets, kept, strict=True)]
        traffic["fill_holes"] = fill_holes_traffic(shape, MODE)
        traffic["compact_fill_holes"] = compact_traffic(shape, MODE, num_moved(order[0]))
        for side, own in named.items():
            fill = operation_call("fill_holes", own, sets, scores, kept)
            calls.setdefault("fill_holes", {})[side] = fill
            move = operation_call("compact", own, sets, scores, order)
            calls.setdefault("compact_fill_holes", {})[side] = move
    if sides.product.shift is not None:
        calls["shift"] = {
            side: operation_call("shift", own, sets, scores, kept) for side, own in named.items()
        }
    return traffic, calls


def operation_call(
    name: str,
    operations: Operations,
    sets: Sequence[RequestSet],
    scores: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> Callable[[int], object]:
    """The operation on the set of a call.

    Keys and values of a set have left the L2 cache when its turn comes again. Scores are a small
    part of them and may not have, as when ``select`` follows ``score`` in a round.
    """
    run: dict[str, Callable[[int], object]] = {
        "score": lambda idx: operations.score(sets[idx]),
        "select": lambda idx: operations.select(sets[idx], scores[idx]),
        "select_redundancy": lambda idx: operations.select_redundancy(sets[idx], scores[idx]),
        "compact": lambda idx: operations.compact(sets[idx], kept[idx]),
        "round": lambda idx: operations.whole_round(sets[idx]),
        "fill_holes": lambda idx: _of(operations.fill_holes)(sets[idx], kept[idx]),
        "shift": lambda idx: _of(operations.shift)(sets[idx]),
    }
    return lambda call_idx: run[name](call_idx % len(sets))


def _of(operation: Callable[..., object] | None) -> Callable[..., object]:
    assert operation is not None, "called only where the product has the operation"
    return operation


def num_moved(order: Tensor) -> int:
    """Tokens of a request, layer and KV head that change place, mean."""
    places = torch.arange(order.shape[-1], device=order.device)
    return round((order != places).sum(dim=-1).double().mean().item())


def total_of(parts: Iterator[Traffic]) -> Traffic:
    """The sum."""
    listed = list(parts)
    return Traffic(sum(part.read for part in listed), sum(part.written for part in listed))


def operation_result(
    name: str,
    times: Mapping[str, Times],
    traffic: Traffic | None,
    bandwidth: float,
    failed: Mapping[str, set[str]],
) -> Json:
    """Times of the sides; bytes and speed-ups of the product where results are right.

    A whole round is right where all its operations are. The speed-up is plain time over product
    time, on the device.
    """
    needs = set(PARTS_OF_A_ROUND) if name == "round" else {name}
    result: Json = {side: own.summary() for side, own in times.items()}
    own_seconds = result["product"]["device_us"]["median"] / 1e6
    if traffic is not None:
        result["bytes"] = traffic.total
        result["copy_share"] = traffic.total / own_seconds / bandwidth
    wrong = needs & failed["product"]
    if wrong:
        result["refused"] = f"results of {', '.join(sorted(wrong))} are wrong"
        result.pop("copy_share", None)
        return result
    for side in ("torch", "plain"):
        if side in times and not (side == "plain" and needs & failed["plain"]):
            other = result[side]["device_us"]["median"]
            result[f"speedup_over_{side}"] = other / result["product"]["device_us"]["median"]
    return result


def run(
    size: Size, output: Path, device: str, sides: Sides, seconds: float, commit: str | None = None
) -> Json:
    """Measure every shape, print the table and write ``output`` after each.

    Shapes that do not fit, or that would not end within ``seconds``, are listed with the reason.
    """
    started = time.monotonic()
    report: Json = {"conditions": conditions(device, commit), "results": [], "skipped": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    shapes = [
        (model, budget, num_requests)
        for budget in size.budgets
        for model in size.models
        for num_requests in size.num_requests
    ]
    spent: dict[int, float] = {}
    for model, budget, num_requests in shapes:
        shape, began = round_shape(model, budget, num_requests), time.monotonic()
        reason = no_memory(shape, device)
        reason = reason or no_time(shape, device, spent, started + seconds - began)
        if reason is None:
            try:
                result = measure(model, budget, num_requests, size, sides, device)
            except torch.cuda.OutOfMemoryError as error:
                reason = f"out of memory: {str(error).splitlines()[0]}"
            else:
                report["results"].append(result)
                spent[all_keys_bytes(shape, device)] = time.monotonic() - began
                print("\n".join(lines_of(result)), flush=True)
            if device != "cpu":
                torch.cuda.empty_cache()
        if reason is not None:
            report["skipped"].append(
                {
                    "model": model.name,
                    "budget": budget,
                    "num_requests": num_requests,
                    "reason": reason,
                }
            )
            print(f"{model.name:<13} {budget:>5} {num_requests:>3}  skipped: {reason}", flush=True)
        report["copy_bytes_per_s"] = median(
            [result["copy_bytes_per_s"] for result in report["results"]] or [0.0]
        )
        report["seconds"] = time.monotonic() - started
        write_json(output, report)
    print(f"copy: {report['copy_bytes_per_s'] / 1e9:.1f} GB/s read and written; wrote {output}")
    return report


def main() -> None:
    """Parse the command line and run. Ends with 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a size for CI: no figure to quote")
    parser.add_argument("--cpu", action="store_true", help="the torch triads, also beside a GPU")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--budgets", nargs="+", type=int, help="default: 2048 512 8192")
    parser.add_argument("--requests", nargs="+", type=int, help="default: 32 1 8 64")
    parser.add_argument("--seconds", type=float, default=600.0, help="no shape ends after these")
    parser.add_argument("--commit", help="what is measured, where this is not a git clone")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels_*.json")
    args = parser.parse_args()
    if not (args.tiny or args.cpu or torch.cuda.is_available()):
        parser.error("no GPU that torch can use; --tiny and --cpu run without one")
    device = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    size = TINY if args.tiny else Size()
    if args.models:
        size = replace(size, models=tuple(m for m in MODELS if m.name in args.models))
    if args.budgets:
        size = replace(size, budgets=tuple(args.budgets))
    if args.requests:
        size = replace(size, num_requests=tuple(args.requests))
    name = f"kernels_{slug(device_name(device))}{'_tiny' if args.tiny else ''}.json"
    output = args.output or HERE / "results" / name
    report = run(size, output, device, default_sides(device), args.seconds, args.commit)
    for failure in (failed := failures(report)):
        print(f"WRONG: {failure}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
