"""What ``decode.py`` measures: engines, what they are asked for, and how much memory they have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpu.models import QWEN3_8B, QWEN3_32B_4BIT, Shape

Json = dict[str, Any]
BLOCK_SIZE = 16
INTERVAL = 128
# Tokens that the first request of a load generates while the last one is still prefilled.
HEAD_START = 128
GIB = 2**30
# Beside weights and KV cache: activations and graphs of an engine that has a card to itself, and of
# one that shares it; how much of a card vLLM takes.
ALONE_BYTES, SHARED_BYTES = int(1.5 * GIB), 8 * GIB
CARD_SHARE, SHARED_CARD_SHARE = 0.9, 0.92


@dataclass(frozen=True)
class Load:
    """So many requests of one context length, decoding. budget: of each of them where they are
    compressed; None: the engine's."""

    context: int
    num_requests: int
    budget: int | None = None


@dataclass(frozen=True)
class Backlog:
    """More requests than fit, for so long. Those that begin are spread over their answers as in a
    server that has run for hours; those that wait behind them begin with a short prompt.

    total, prompt: tokens of a finished request, and of one that begins.
    """

    total: int = 32_768
    prompt: int = 256
    num_waiting: int = 256
    seconds: float = 60.0


@dataclass(frozen=True)
class Side:
    """An engine. settings: of compression, None without. arguments: of ``LLM``, beside the case's.
    bits: that a number of its KV cache takes."""

    settings: Json | None = None
    arguments: Json = field(default_factory=dict)
    bits: float = 16

    @property
    def most_prompt(self) -> int | None:
        """Tokens of the longest prompt with which a request of a backlog begins; None: any. Of a
        longer one no more would stay in the cache."""
        if self.settings is None:
            return None
        return int(self.settings["budget"] + 2 * self.settings["interval"])

    @property
    def mean_held(self) -> int | None:
        """Tokens that a request of a backlog holds on average; None: half of its total."""
        if self.settings is None:
            return None
        return int(self.settings["budget"] + self.settings["interval"])


@dataclass(frozen=True)
class Case:
    """Sides that share the card take turns, others have it one after another.

    card_gib: each side's KV cache is what such a card leaves; None: what the loads need, or the
    sides' part of this card. eager: without graphs, where methods look at queries.
    """

    sides: Mapping[str, Side]
    loads: tuple[Load, ...] = ()
    backlog: Backlog | None = None
    shape: Shape = QWEN3_8B
    together: bool = False
    card_gib: int | None = None
    eager: bool = False
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 32

    def only(self, names: Sequence[str]) -> "Case":
        """The case with these sides alone. Raises ValueError for one that it has not."""
        unknown = [name for name in names if name not in self.sides]
        if unknown:
            has = ", ".join(self.sides)
            raise ValueError(f"this case has no side {', '.join(unknown)}; it has {has}")
        return replace(self, sides={name: self.sides[name] for name in names})

    @property
    def max_model_len(self) -> int:
        """Longest request of a backlog, which every side has to serve."""
        assert self.backlog is not None
        return self.backlog.total + BLOCK_SIZE


def settings(budget: int, method: str = "triattention") -> Json:
    """Of compression, all else by default."""
    return {"method": method, "budget": budget, "interval": INTERVAL}


# The second stays below the trigger of every budget: there compression must cost nothing.
LOADS = (Load(8192, 32), Load(256, 32))
FURTHER_LOADS = (Load(32_768, 8), Load(8192, 8), Load(8192, 1), Load(32_768, 1))
OTHER_BUDGETS = (1024, 2048, 3072, 4096)
PEERS = ("triattention", "streamingllm", "snapkv", "rkv", "knorm")


def all_cases(budget: int, num_layers: int | None = None) -> dict[str, Case]:
    """By name. num_layers: fewer than the model has, for a smaller card."""
    compressed = Side(settings(budget))
    both = {"full": Side(), "compressed": compressed}
    fp8 = {"kv_cache_dtype": "fp8"}
    half = {
        "full": Side(arguments=fp8, bits=8),
        "compressed": Side(settings(budget), fp8, bits=8),
    }
    four_bits = {"kv_cache_dtype": "turboquant_4bit_nc"}
    caches = {
        "full": Side(),
        "fp8": half["full"],
        "turboquant": Side(arguments=four_bits, bits=4.5),
        "compressed": compressed,
        "compressed_fp8": half["compressed"],
    }
    others = tuple(replace(LOADS[0], budget=own) for own in OTHER_BUDGETS if own != budget)
    queue = Case(both, backlog=Backlog(), max_num_seqs=256)
    short = replace(queue, card_gib=24, max_num_batched_tokens=2048, max_num_seqs=64)
    cases = {
        "batches": Case(both, LOADS + others + FURTHER_LOADS, together=True),
        "batch128": Case(both, (Load(4096, 128),), max_num_seqs=128),
        "fp8": Case(half, LOADS + FURTHER_LOADS, together=True),
        "card24": short,
        "card80": replace(queue, card_gib=80),
        "large": replace(short, shape=QWEN3_32B_4BIT, max_num_seqs=16),
        "peers": Case(
            {name: Side(settings(budget, name)) for name in PEERS}, (Load(8192, 8),), eager=True
        ),
        "caches": replace(short, sides=caches, backlog=Backlog(seconds=25.0)),
    }
    if num_layers is None:
        return cases
    return {
        name: replace(case, shape=replace(case.shape, num_layers=num_layers))
        for name, case in cases.items()
    }


@dataclass(frozen=True)
class Size:
    """What one case has on this card. num_steps: of every load."""

    case: Case
    num_steps: int
    pool_bytes: int

    def needed_bytes(self, load: Load) -> int:
        """KV cache of full attention at the end of a load, in bf16."""
        return needed_tokens(load, self.num_steps) * self.case.shape.token_bytes

    @property
    def max_model_len(self) -> int:
        """Longest context that fits, and its answer."""
        if self.case.backlog is not None:
            return self.case.max_model_len
        loads = self.case.loads
        fitting = [load.context for load in loads if self.needed_bytes(load) <= self.pool_bytes]
        return max(fitting) + self.num_steps + HEAD_START


def needed_tokens(load: Load, num_steps: int) -> int:
    """Cached by full attention at the end of a load."""
    return load.num_requests * (load.context + num_steps + HEAD_START + 2 * BLOCK_SIZE)


def size_for(case: Case, total_memory: int, num_steps: int) -> Size:
    """The KV cache of each side: what is left of the card that the case names; else what the
    largest load needs, or the sides' equal parts of this card beside their weights. Raises
    ValueError where that is not enough for the smallest load.
    """
    shape = case.shape
    if case.card_gib is not None:
        left = CARD_SHARE * case.card_gib * GIB - shape.weight_bytes - ALONE_BYTES
        if min(case.card_gib * GIB, left + shape.weight_bytes + ALONE_BYTES) > total_memory:
            raise ValueError(
                f"a card of {case.card_gib} GiB is asked for, and this one has"
                f" {total_memory / GIB:.0f}; leave this case out"
            )
        return Size(case, num_steps, int(left))
    needed = [needed_tokens(load, num_steps) * shape.token_bytes for load in case.loads]
    num_sharing = len(case.sides) if case.together else 1
    left = SHARED_CARD_SHARE * total_memory / num_sharing - shape.weight_bytes - SHARED_BYTES
    if left < min(needed):
        raise ValueError(
            f"{num_sharing} engines of {shape.num_layers} layers and {min(needed) / GIB:.1f} GiB of"
            f" KV cache each do not fit in {total_memory / GIB:.0f} GiB; give fewer with --layers"
        )
    return Size(case, num_steps, int(min(max(needed), left)))
