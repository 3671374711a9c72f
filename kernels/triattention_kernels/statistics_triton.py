"""What ``select`` needs before it ranks, in one launch: statistics of each query head's scores, and
where it is asked for, redundancy of each KV head's values."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention_kernels.paged_triton import as_stored
from triattention_kernels.redundancy import Repeats
from triattention_kernels.redundancy_triton import redundancy_constants, tile_redundancy
from triattention_kernels.round_batch import RoundBatch

# Fixed, so that the order of a sum, and with it the result, depends on the request alone.
STATISTICS_TILE = 1024


class Statistics(NamedTuple):
    """means, stds: [R, L, H] of the candidates' finite scores. penalty: [R, L, H_kv, T_max], what
    is taken off; only candidates are written."""

    means: Tensor
    stds: Tensor
    penalty: Tensor | None


@triton.jit
def row_statistics(values, first, end, TILE: tl.constexpr):
    """Mean and population std, at least 1e-6, of one row's finite candidates."""
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    num_finite = tl.zeros((TILE,), tl.int32)
    for start in range(first, end, TILE):
        value = tl.load(values + start + lanes, mask=start + lanes < end, other=float("nan"))
        finite = tl.abs(value) < float("inf")
        total += tl.where(finite, value, 0.0)
        num_finite += finite.to(tl.int32)
    count = tl.maximum(tl.sum(num_finite), 1).to(tl.float32)
    mean = tl.div_rn(tl.sum(total), count)
    squares = tl.zeros((TILE,), tl.float32)
    for start in range(first, end, TILE):
        value = tl.load(values + start + lanes, mask=start + lanes < end, other=float("nan"))
        centred = tl.where(tl.abs(value) < float("inf"), value - mean, 0.0)
        squares += centred * centred
    return mean, tl.maximum(tl.sqrt_rn(tl.div_rn(tl.sum(squares), count)), 1e-6)


@triton.jit
def statistics_kernel(
    scores, counts, means, stds, num_tokens, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """One program: the statistics of one row."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    first = tl.load(counts + tl.program_id(1) * 3 + 2)
    end = tl.load(counts + tl.program_id(1) * 3) * BLOCK_SIZE
    mean, std = row_statistics(scores + row * num_tokens, first, end, TILE)
    tl.store(means + row, mean)
    tl.store(stds + row, std)


@triton.jit(do_not_specialize=["num_tiles", "num_columns"])
def statistics_and_redundancy_kernel(
    scores,
    values,
    layer_starts,
    source_blocks,
    counts,
    means,
    stds,
    penalty,
    weight,
    most_later,
    num_tokens,
    num_tiles,
    num_columns,
    num_layers,
    num_rows,
    num_kv_heads,
    stride_block,
    stride_head,
    stride_s1,
    stride_s2,
    stride_d1,
    stride_d2,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    S2: tl.constexpr,
    D2: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    LAYER_UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    SQUARINGS: tl.constexpr,
    TILE: tl.constexpr,
    LATER_TILE: tl.constexpr,
    STATISTICS_TILE: tl.constexpr,
):
    """One program: the redundancy of a tile of tokens in one KV head and layer, or, behind all of
    these, the statistics of one row.

    The tiles of a KV head run beside each other, longest first, and find its values in L2; rows
    fill what is left at the end.
    """
    request = tl.program_id(1).to(tl.int64)
    first = tl.load(counts + request * 3 + 2)
    end = tl.load(counts + request * 3) * BLOCK_SIZE
    kv_row = tl.program_id(0) // num_tiles
    if kv_row < num_layers * num_kv_heads:
        layer = kv_row // num_kv_heads
        values += tl.load(layer_starts + num_layers + layer) * LAYER_UNIT
        values += (kv_row % num_kv_heads).to(tl.int64) * stride_head * STRIDE_UNIT
        tile = tl.program_id(0) % num_tiles
        found = tile_redundancy(
            values,
            source_blocks + request * num_columns,
            tile,
            first,
            end,
            most_later,
            stride_block,
            stride_s1,
            stride_s2,
            stride_d1,
            stride_d2,
            BLOCK_SIZE,
            HEAD_DIM,
            DIMS,
            S2,
            D2,
            VALUE_FORMAT,
            STRIDE_UNIT,
            EXACT,
            SQUARINGS,
            TILE,
            LATER_TILE,
        )
        tokens = first + tile * TILE + tl.arange(0, TILE)
        own = penalty + (request * num_layers * num_kv_heads + kv_row) * num_tokens
        tl.store(own + tokens, weight * found, mask=tokens < end)
    else:
        row = tl.program_id(0) - num_layers * num_kv_heads * num_tiles
        row += request * num_rows
        mean, std = row_statistics(scores + row * num_tokens, first, end, STATISTICS_TILE)
        tl.store(means + row, mean)
        tl.store(stds + row, std)


def statistics(
    scores: Tensor, batch: RoundBatch, block_size: int, num_kv_heads: int, repeats: Repeats | None
) -> Statistics:
    """Of scores [R, L, H, T_max] float32, contiguous. One launch.

    Moves its part of ``traffic.select_traffic``. Redundancy reads the values of a KV head
    ``T / (2 TILE)`` times on average, from L2 but for the first, and takes ``L H_kv T^2 D``
    floating-point operations a request, since only later tokens count; above ``most_later`` tokens
    ``2 L H_kv T most_later D`` at most.

    Products of values as they are stored are exact, and only their sums round. Tensor cores add up
    all dims at once here, not 16 as in ``score``: they cut off some 1e-7 of a cosine and so 1e-6 of
    its eighth power, where a ranking value is a standard deviation.
    """
    num_requests, num_layers, num_heads, num_tokens = scores.shape
    # Each in memory of its own: compiled code depends on whether a tensor starts at a multiple of
    # 16 bytes, which must not depend on the number of requests.
    means = scores.new_empty(num_requests, num_layers, num_heads)
    stds = torch.empty_like(means)
    num_rows = num_layers * num_heads
    if repeats is None:
        statistics_kernel[(num_rows, num_requests)](
            scores,
            batch.counts,
            means,
            stds,
            num_tokens,
            BLOCK_SIZE=block_size,
            TILE=STATISTICS_TILE,
            num_warps=4,
        )
        return Statistics(means, stds, None)
    kv = repeats.kv
    values, value_format = as_stored("values", kv.values)
    unit = 1 if kv.scales is None else 4  # as in ``score``
    penalty = scores.new_empty(num_requests, num_layers, num_kv_heads, num_tokens)
    constants = redundancy_constants(kv.values.dtype, kv.head_dim)
    num_tiles = triton.cdiv(num_tokens, constants["TILE"])
    grid = (num_layers * num_kv_heads * num_tiles + num_rows, num_requests)
    statistics_and_redundancy_kernel[grid](
        scores,
        values,
        kv.layer_starts,
        batch.source_blocks,
        batch.counts,
        means,
        stds,
        penalty,
        repeats.weight,
        repeats.most_later,
        num_tokens,
        num_tiles,
        batch.source_blocks.shape[1],
        num_layers,
        num_rows,
        num_kv_heads,
        *(stride // unit for stride in values.stride()[1:5]),
        *values.stride()[5:],
        BLOCK_SIZE=block_size,
        S2=kv.values.shape[4],
        D2=kv.values.shape[6],
        VALUE_FORMAT=value_format,
        LAYER_UNIT=kv.layer_unit // values.itemsize,
        STRIDE_UNIT=unit,
        STATISTICS_TILE=STATISTICS_TILE,
        **constants,
        num_warps=8,
    )
    return Statistics(means, stds, penalty)
