"""What the kernel benchmark works on: model shapes, and caches with requests due for a round."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triattention_kernels import (
    Implementation,
    PagedKV,
    Repeats,
    RoundBatch,
    Selection,
    compact,
    fill_holes,
    score,
    select,
    shift_rows,
)
from triattention_kernels.traffic import RoundShape

from triattention_vllm import Settings
from triattention_vllm.method.policy import ceil_to_block

DEFAULTS = Settings()
LOGICAL_LENGTH = 32_768  # tokens of a request, for the rows that are shifted
MODE: Selection = DEFAULTS.selection
REDUNDANCY = DEFAULTS.redundancy / 100  # taken off the ranking


@dataclass(frozen=True)
class Model:
    """The full-attention layers of a model. All rotate every head dim."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


MODELS = (
    Model("Qwen3-8B", 36, 32, 8, 128),
    Model("Llama-3.1-8B", 32, 32, 8, 128),
    Model("Qwen3-32B", 64, 64, 8, 128),
    Model("gpt-oss-20b", 12, 64, 8, 64),
)


def round_shape(model: Model, budget: int, num_requests: int) -> RoundShape:
    """The first round of a request with a short prompt, as the default settings have it.

    The region has whole blocks: sinks that fill one lie before it. Raises SettingsError for a
    budget that a server refuses.
    """
    settings = replace(DEFAULTS, budget=budget)
    settings.check_block_size(model.block_size)
    policy = settings.policy(model.block_size)
    due = policy.due_round(budget + policy.interval, num_evicted=0, num_prompt_tokens=1)
    assert due is not None, "budget + interval tokens are cached"
    first_block = ceil_to_block(due.first_candidate, model.block_size) // model.block_size
    num_source_blocks = due.end_candidate // model.block_size - first_block
    return RoundShape(
        num_requests=num_requests,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rotary_dim=model.head_dim,
        block_size=model.block_size,
        num_source_blocks=num_source_blocks,
        num_destination_blocks=num_source_blocks - due.num_newly_evicted // model.block_size,
        element_bytes=model.dtype.itemsize,
    )


def key_bytes(shape: RoundShape) -> int:
    """Bytes of the keys of all regions; the values are as many."""
    rows = shape.num_requests * shape.num_layers * shape.num_kv_heads
    return rows * shape.num_tokens * shape.row_bytes


@dataclass(frozen=True)
class RequestSet:
    """One batch of rounds in a cache that all sets share, in blocks of its own."""

    kv: PagedKV
    batch: RoundBatch
    centres: Tensor  # [L, H, D] float32
    norm_weights: Tensor  # [L, H, D / 2] float32
    turns: Tensor  # [R, L, D / 2] complex64, shared by the layers
    block_table: Tensor  # [R, W] int32, null head, then sinks, region and window
    seq_lens: Tensor  # [R] int32
    out_table: Tensor
    out_seq_lens: Tensor
    num_null: int
    num_cached_blocks: int


def make_request_sets(
    shape: RoundShape, budget: int, dtype: torch.dtype, num_sets: int, device: str
) -> list[RequestSet]:
    """Rounds of ``round_shape`` for this budget, in place: destination block j is source block j.
    Random keys and values, the values about as like each other as two at 60 degrees; every
    request's blocks are scattered over the whole pool, as they are in a server that has run for a
    while.

    Layout: layer, block, token, KV head, key beside value (vLLM's ``LBNHC``, its default on CUDA).
    """
    generator = torch.Generator(device).manual_seed(0)
    num_used = num_sets * shape.num_requests * shape.num_source_blocks
    size = (shape.num_layers, num_used + 1, shape.block_size, shape.num_kv_heads)
    storage = torch.empty(*size, 2 * shape.head_dim, dtype=dtype, device=device)
    for layer in storage:
        layer.normal_(generator=generator)
    storage[..., shape.head_dim :] += 1
    kv = PagedKV.from_blocks(storage.transpose(2, 3))
    ids = 1 + torch.randperm(num_used, generator=generator, device=device)
    rows = ids.view(num_sets, shape.num_requests, shape.num_source_blocks)
    num_cached = (budget + DEFAULTS.interval) // shape.block_size
    return [_request_set(kv, shape, num_cached, source.contiguous(), generator) for source in rows]


def _request_set(
    kv: PagedKV, shape: RoundShape, num_cached: int, source: Tensor, generator: torch.Generator
) -> RequestSet:
    """num_cached: blocks of a request: sinks, region, window and what is newer."""
    num_requests, device = shape.num_requests, source.device
    weights = random_weights(shape, generator, device)
    batch = RoundBatch(
        source_blocks=source,
        destination_blocks=source[:, : shape.num_destination_blocks].contiguous(),
        num_source_blocks=(shape.num_source_blocks,) * num_requests,
        num_destination_blocks=(shape.num_destination_blocks,) * num_requests,
        first_candidate=(0,) * num_requests,
        moves_forward=True,
    )
    num_null = max(LOGICAL_LENGTH // shape.block_size - num_cached, 1)
    table = torch.zeros(num_requests, num_null + num_cached, dtype=torch.int32, device=device)
    table[:, num_null : num_null + shape.num_source_blocks] = source
    table[:, num_null + shape.num_source_blocks :] = source[:, :1]
    seq_lens = torch.full(
        (num_requests,), table.shape[1] * shape.block_size, dtype=torch.int32, device=device
    )
    outputs = torch.zeros_like(table), torch.zeros_like(seq_lens)
    return RequestSet(kv, batch, *weights, table, seq_lens, *outputs, num_null, num_cached)


def random_weights(
    shape: RoundShape, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, norm weights and turns; all layers have the same frequencies."""
    heads = (shape.num_layers, shape.num_heads)
    num_frequencies = shape.rotary_dim // 2
    centres = torch.randn(*heads, shape.head_dim, generator=generator, device=device)
    norms = torch.rand(*heads, num_frequencies, generator=generator, device=device)
    angles = torch.rand(
        shape.num_requests, 1, num_frequencies, generator=generator, device=device
    ) * (2 * torch.pi)
    turns = torch.polar(torch.ones_like(angles), angles)
    return centres, norms, turns.expand(-1, shape.num_layers, -1)


def some_requests(batch: RoundBatch, indices: list[int]) -> RoundBatch:
    """The rounds of these requests alone."""
    picked = torch.tensor(indices, device=batch.source_blocks.device)
    return RoundBatch(
        source_blocks=batch.source_blocks[picked],
        destination_blocks=batch.destination_blocks[picked],
        num_source_blocks=tuple(batch.num_source_blocks[idx] for idx in indices),
        num_destination_blocks=tuple(batch.num_destination_blocks[idx] for idx in indices),
        first_candidate=tuple(batch.first_candidate[idx] for idx in indices),
        moves_forward=batch.moves_forward,
    )


@dataclass(frozen=True)
class Operations:
    """The operations on request sets, in one implementation."""

    score: Callable[[RequestSet], Tensor]
    select: Callable[[RequestSet, Tensor], Tensor]
    select_redundancy: Callable[[RequestSet, Tensor], Tensor]
    compact: Callable[[RequestSet, Tensor], None]
    fill_holes: Callable[[RequestSet, Tensor], Tensor] | None = None
    shift: Callable[[RequestSet], None] | None = None

    def whole_round(self, requests: RequestSet) -> None:
        """Score, select with redundancy and compact."""
        self.compact(requests, self.select_redundancy(requests, self.score(requests)))


def product_operations(implementation: Implementation) -> Operations:
    """The product's own, through their checks and dispatch."""

    def run_score(r: RequestSet) -> Tensor:
        weights = (r.centres, r.norm_weights, r.turns)
        return score(r.kv, r.batch, *weights, False, r.kv.head_dim, implementation)

    def run_select(r: RequestSet, scores: Tensor) -> Tensor:
        size = (r.kv.block_size, r.kv.num_kv_heads)
        return select(scores, r.batch, *size, MODE, implementation)

    def run_select_redundancy(r: RequestSet, scores: Tensor) -> Tensor:
        size = (r.kv.block_size, r.kv.num_kv_heads)
        return select(scores, r.batch, *size, MODE, implementation, Repeats(r.kv, REDUNDANCY))

    def run_compact(r: RequestSet, kept: Tensor) -> None:
        compact(r.kv, r.batch, kept, implementation)

    def run_fill_holes(r: RequestSet, kept: Tensor) -> Tensor:
        return fill_holes(kept, r.batch, r.kv.block_size, implementation)

    def run_shift(r: RequestSet) -> None:
        rows, outputs = (r.block_table, r.seq_lens), (r.out_table, r.out_seq_lens)
        shift_rows(*rows, r.kv.block_size, *outputs, implementation=implementation)

    return Operations(
        run_score, run_select, run_select_redundancy, run_compact, run_fill_holes, run_shift
    )
