"""``triattention plan``: how many tokens and requests fit on a GPU, with and without compression.

Counted from the model's configuration; nothing is loaded and no GPU is needed.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from triattention_vllm.config import Settings
from triattention_vllm.errors import SettingsError, UnsupportedError
from triattention_vllm.method.policy import Policy
from triattention_vllm.tools.model_shape import (
    ITEM_BYTES,
    ModelShape,
    read_model,
    weight_files_bytes,
)
from triattention_vllm.tools.pool import (
    WEIGHT_BITS,
    Deployment,
    Layout,
    lay_out,
    longest_request,
    request_blocks,
)
from triattention_vllm.tools.terminal import console, say, table

GIB = 1 << 30
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
_KV_ITEM_BYTES = {**ITEM_BYTES, "fp8": 1}
_POSITIVE = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "block_size",
    "max_num_batched_tokens",
    "gpu_memory",
    "weights",
)
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Fit:
    """Requests of ``num_tokens`` tokens: most blocks that one holds, and how many fit at once."""

    num_tokens: int
    full_blocks: int
    full_requests: int
    compressed_blocks: int
    compressed_requests: int


@dataclass(frozen=True)
class Plan:
    """What ``triattention plan`` prints; sizes in bytes are of one GPU (the fullest stage).

    num_blocks: of the pool, vLLM's null block included. wall_tokens: one request with full
    attention fills the pool. longest_compressed: longest request that is served with the budget,
    0 where not even its first prompt chunks fit. prefill_blocks: most blocks of a request while
    its prompt is read.
    """

    model: str
    num_parameters: int
    num_layers: int
    num_full_layers: int
    num_gpus: int
    weights_from: str
    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    block_size: int
    block_bytes: int
    num_blocks: int
    wall_tokens: int
    budget: int
    interval: int
    longest_compressed: int
    prefill_blocks: int
    fits: list[Fit]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The names are those of ``vllm serve`` where it has the same notion."""
    parser.usage = "%(prog)s MODEL --gpu-memory GIB [--budget TOKENS] [options]"
    add = parser.add_argument
    add("model", metavar="MODEL", help="config.json, model folder or model name")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU")
    add("--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="(0.92)")
    add("--reserve", type=float, default=1.0, metavar="GIB", help="activations, graphs (1)")
    dtypes = ", ".join(WEIGHT_BITS)
    add("--weights-dtype", choices=WEIGHT_BITS, metavar="TYPE", help=f"{dtypes} (every weight)")
    add("--weights", type=float, metavar="GIB", help="on one GPU, instead of counting them")
    add("--kv-cache-memory-bytes", type=_size, metavar="SIZE", help="pool, instead of the rest")
    kinds = ("auto", *_KV_ITEM_BYTES)
    add("--kv-cache-dtype", choices=kinds, default="auto", metavar="TYPE", help=", ".join(kinds))
    add("-tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="(1)")
    add("-pp", "--pipeline-parallel-size", type=int, default=1, metavar="N", help="(1)")
    add("--block-size", type=int, default=16, metavar="TOKENS", help="(16; CPU build: 128)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="(2048, as vllm serve takes below 70 GiB)",
    )
    add("--budget", type=int, default=2048, metavar="TOKENS", help="(2048)")
    add("--interval", type=int, default=128, metavar="TOKENS", help="(128)")
    add("--length", type=int, nargs="+", metavar="TOKENS", help="of requests (4096 and up)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, metavar="FILE", help="write a picture (.png, .svg, .pdf)")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0. Raises UnsupportedError or SettingsError for what cannot be counted."""
    _check(args)
    model = read_model(args.model)
    plan = make_plan(model, args)
    if args.json:
        print(json.dumps(asdict(plan), indent=1))
    else:
        _show(plan, args)
    if args.plot is not None:
        from triattention_vllm.tools.plan_plot import plot_plan

        plot_plan(plan, args.plot)
        if not args.json:
            print(f"wrote {args.plot}")
    return 0


def make_plan(model: ModelShape, args: argparse.Namespace) -> Plan:
    """Count everything for the arguments of the command line."""
    dtype = model.dtype or "bfloat16"
    weights_from, weights_dtype = _weights_source(model, dtype, args)
    kv_dtype = dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    deployment = Deployment(
        tensor_parallel=args.tensor_parallel_size,
        pipeline_parallel=args.pipeline_parallel_size,
        weights_dtype=weights_dtype,
        dtype=dtype,
        kv_item_bytes=_KV_ITEM_BYTES[kv_dtype],
        block_size=args.block_size,
    )
    layout = lay_out(model, deployment)
    num_gpus = args.tensor_parallel_size * args.pipeline_parallel_size
    weights = list(layout.weights)
    if args.weights is not None:
        weights = [round(args.weights * GIB)] * len(weights)
    elif weights_from == "files":
        counted = sum(weights) * args.tensor_parallel_size
        weights = [own * weight_files_bytes(args.model) // counted for own in weights]
    kv_bytes = _kv_bytes(weights, args)
    settings = Settings(budget=args.budget, interval=args.interval)
    settings.check_block_size(layout.block_size)
    policy = settings.policy(layout.block_size)
    num_blocks = layout.num_blocks(kv_bytes)
    usable = num_blocks - 1  # vLLM's null block
    longest = model.max_position_embeddings
    in_flight = (args.pipeline_parallel_size + 1) * args.max_num_batched_tokens
    prefill = request_blocks(layout, longest, policy, in_flight)
    lengths = args.length or [length for length in LENGTHS if length <= longest] or [longest]
    fullest = max(range(len(weights)), key=weights.__getitem__)
    return Plan(
        model=model.name,
        num_parameters=model.num_parameters,
        num_layers=model.num_layers,
        num_full_layers=model.num_full_layers,
        num_gpus=num_gpus,
        weights_from=weights_from,
        weights_bytes=weights[fullest],
        kv_bytes=kv_bytes[fullest],
        kv_bytes_per_token=layout.bytes_per_token,
        block_size=layout.block_size,
        block_bytes=max(layout.block_bytes),
        num_blocks=num_blocks,
        wall_tokens=longest_request(layout, usable),
        budget=args.budget,
        interval=args.interval,
        longest_compressed=longest if prefill <= usable else 0,
        prefill_blocks=prefill,
        fits=[fit(layout, policy, usable, length) for length in lengths],
    )


def fit(layout: Layout, policy: Policy, usable: int, num_tokens: int) -> Fit:
    """Requests of one length that decode at once in ``usable`` blocks."""
    full = request_blocks(layout, num_tokens, None)
    compressed = request_blocks(layout, num_tokens, policy)
    return Fit(num_tokens, full, usable // full, compressed, usable // compressed)


def _weights_source(model: ModelShape, dtype: str, args: argparse.Namespace) -> tuple[str, str]:
    """Where the size of the weights comes from, and the key of WEIGHT_BITS it is counted with."""
    if args.weights is not None:
        return "--weights", dtype
    if args.weights_dtype is not None:
        return args.weights_dtype, args.weights_dtype
    if weight_files_bytes(args.model):
        return "files", dtype
    if model.quantisation is None:
        return dtype, dtype
    if model.quantisation not in WEIGHT_BITS:
        raise UnsupportedError(
            f"{args.model}: its weights are quantised with {model.quantisation!r}; give "
            f"--weights-dtype ({', '.join(WEIGHT_BITS)}) or their size with --weights GIB."
        )
    return model.quantisation, model.quantisation


def _kv_bytes(weights: list[int], args: argparse.Namespace) -> list[int]:
    """Bytes of the pool on each stage: what utilization, weights and reserve leave."""
    if args.kv_cache_memory_bytes is not None:
        return [args.kv_cache_memory_bytes] * len(weights)
    usable = (args.gpu_memory * args.gpu_memory_utilization - args.reserve) * GIB
    left = [int(usable) - own for own in weights]
    if min(left) <= 0:
        raise UnsupportedError(
            f"The weights take {max(weights) / GIB:.1f} GiB on a GPU, and {args.gpu_memory:g} GiB "
            f"x {args.gpu_memory_utilization:g} less a reserve of {args.reserve:g} GiB is "
            f"{usable / GIB:.1f} GiB, so nothing is left for the KV cache; use more GPUs "
            "(--tensor-parallel-size), smaller weights (--weights-dtype) or a larger GPU."
        )
    return left


def _check(args: argparse.Namespace) -> None:
    """Raise SettingsError for numbers that are missing or out of range."""
    if args.gpu_memory is None and args.kv_cache_memory_bytes is None:
        raise SettingsError(
            "Neither --gpu-memory nor --kv-cache-memory-bytes is given; name the memory of one "
            "GPU in GiB, such as --gpu-memory 24."
        )
    if not 0 < args.gpu_memory_utilization <= 1:
        raise SettingsError(
            f"--gpu-memory-utilization is {args.gpu_memory_utilization:g}, allowed is a share "
            "above 0 and at most 1."
        )
    for name in _POSITIVE:
        value = vars(args)[name]
        if value is not None and value <= 0:
            flag = name.replace("_", "-")
            raise SettingsError(f"--{flag} is {value:g}, allowed is a number above 0.")
    if args.reserve < 0:
        raise SettingsError(f"--reserve is {args.reserve:g}, allowed is 0 GiB or more.")
    if args.length is not None and min(args.length) < 1:
        raise SettingsError(f"--length has {min(args.length)}, allowed is 1 token or more.")


def _size(text: str) -> int:
    """Bytes, as vLLM reads them: 64M is 64 MiB, 64m is 64 million."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4G, 64M or 1000000")
    return int(float(found[1]) * _SUFFIXES[found[2]])


def _show(plan: Plan, args: argparse.Namespace) -> None:
    """Sentences and a table."""
    out = console()
    for sentence in _sentences(plan, args):
        say(out, sentence)
    columns = ("tokens each", "full: blocks", "fit", f"budget {plan.budget}: blocks", "fit")
    rows = [[str(value) for value in asdict(row).values()] for row in plan.fits]
    table(out, "Requests that decode at once", columns, rows)


def _sentences(plan: Plan, args: argparse.Namespace) -> list[str]:
    """The assumptions and what follows from them."""
    gib = f"{plan.weights_bytes / GIB:.1f} GiB of weights ({plan.weights_from})"
    memory = f"a pool of {plan.kv_bytes / GIB:.2f} GiB"
    if args.kv_cache_memory_bytes is None:
        memory = (
            f"{args.gpu_memory:g} GiB x {args.gpu_memory_utilization:g} - {gib} - "
            f"{args.reserve:g} GiB reserve = {plan.kv_bytes / GIB:.2f} GiB for KV blocks"
        )
    lines = [
        f"{plan.model}: {plan.num_parameters / 1e9:.2f} B parameters, {plan.num_layers} layers, "
        f"{plan.num_full_layers} of them full attention.",
        f"On {'the GPU' if plan.num_gpus == 1 else f'each of {plan.num_gpus} GPUs'}: {memory}.",
        f"{plan.num_blocks} blocks of {plan.block_size} tokens and {plan.block_bytes / 1024:.0f} "
        f"KiB; {plan.kv_bytes_per_token / 1024:g} KiB per token.",
        f"Full attention hits the wall at {plan.wall_tokens} tokens: vLLM starts with no longer "
        "--max-model-len.",
    ]
    if plan.longest_compressed:
        lines.append(
            f"With budget {plan.budget} one request may have {plan.longest_compressed} tokens (the "
            f"model's limit): it holds at most {plan.prefill_blocks} blocks while its prompt is "
            "read, and fewer while it decodes."
        )
    else:
        lines.append(
            f"With budget {plan.budget} a long prompt needs {plan.prefill_blocks} blocks while it "
            "is read, more than the pool has; lower --max-num-batched-tokens or the budget."
        )
    return lines
