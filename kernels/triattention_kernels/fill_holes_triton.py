"""``fill_holes`` on a GPU: every place looks up its token by binary search."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention_kernels.round_batch import RoundBatch

TILE = 512


@triton.jit
def num_below(kept, num_kept, bounds, num_steps):
    """Kept tokens, of ``num_kept`` ascending ones, below each bound."""
    low = tl.zeros_like(bounds)
    high = low + num_kept
    for _ in range(num_steps):
        middle = (low + high) // 2
        token = tl.load(kept + middle, mask=middle < high, other=0)
        is_below = (middle < high) & (token < bounds)
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    return low


@triton.jit(do_not_specialize=["num_steps"])
def fill_kernel(
    kept,
    counts,
    order,
    num_kept_max,
    num_sets,
    num_steps,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of places of one keep set."""
    keep_set = tl.program_id(1).to(tl.int64) * num_sets + tl.program_id(0) % num_sets
    num_kept = tl.load(counts + tl.program_id(1) * 3 + 1) * BLOCK_SIZE
    kept += keep_set * num_kept_max
    places = tl.program_id(0) // num_sets * TILE + tl.arange(0, TILE)
    within = places < num_kept
    before = num_below(kept, num_kept, places, num_steps)
    token = tl.load(kept + before, mask=within & (before < num_kept), other=-1)
    num_inside = num_below(kept, num_kept, tl.zeros_like(places) + num_kept, num_steps)
    stays = token == places
    behind = num_inside + places - before
    token = tl.load(kept + behind, mask=within & ~stays, other=0)
    token = tl.where(within & stays, places, token)
    tl.store(order + keep_set * num_kept_max + places, token, mask=places < num_kept_max)


def fill_holes(kept: Tensor, batch: RoundBatch, block_size: int) -> Tensor:
    """See ``triattention_kernels.fill_holes.fill_holes``; ``kept`` is contiguous. One launch."""
    order = torch.empty_like(kept)
    num_requests, num_kept_max = kept.shape[0], kept.shape[3]
    num_sets = kept.shape[1] * kept.shape[2]
    fill_kernel[(triton.cdiv(num_kept_max, TILE) * num_sets, num_requests)](
        kept,
        batch.counts,
        order,
        num_kept_max,
        num_sets,
        num_kept_max.bit_length(),
        BLOCK_SIZE=block_size,
        TILE=TILE,
        num_warps=4,
    )
    return order
