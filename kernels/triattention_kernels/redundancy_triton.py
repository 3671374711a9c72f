"""Redundancy of a tile of tokens on a GPU, as a part of ``statistics_triton``'s launch."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os
from typing import Any

import torch
import triton
import triton.language as tl

from triattention_kernels.paged_triton import dim_offsets, to_float32, token_offsets
from triattention_kernels.redundancy_torch import SQUARINGS

# Of the later values that a program is at: of all of them, and of one dim of them. It holds twice
# as many of its own, so that what it reads again from L2 is multiplied often enough.
LATER_BYTES = 16384
LATER_BYTES_OF_DIM = 128
LEAST_LATER = 16  # the smallest side that every tensor core multiplies


@triton.jit
def load_values(
    values,
    block_table,
    tokens,
    present,
    stride_block,
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
    STRIDE_UNIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Values [T, DIMS] as EXACT numbers, 0 where not ``present``, and one over their lengths [T];
    0 for a value of zeros."""
    places = token_offsets(
        block_table, tokens, present, stride_block, stride_s1, stride_s2, BLOCK_SIZE, S2
    )
    dims = tl.arange(0, DIMS)
    row = values + (places * STRIDE_UNIT)[:, None] + dim_offsets(dims, stride_d1, stride_d2, D2)
    mask = present[:, None]
    if DIMS > HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    stored = tl.load(row, mask=mask, other=0)
    numbers = to_float32(stored, VALUE_FORMAT)
    length = tl.sqrt(tl.sum(numbers * numbers, axis=1))
    exact = numbers.to(EXACT) if stored.dtype != EXACT else stored
    return exact, tl.where(length > 0, 1 / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def tile_redundancy(
    values,
    block_table,
    tile,
    first,
    end,
    most_later,
    stride_block,
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
    STRIDE_UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    SQUARINGS: tl.constexpr,
    TILE: tl.constexpr,
    LATER_TILE: tl.constexpr,
):
    """Redundancy [TILE] of the candidates from ``first + tile * TILE`` on, against the next
    ``most_later`` of each.

    Tiles before the own one are not looked at. Later tiles follow in order, so that a sum depends
    on the request alone.
    """
    own_tokens = first + tile * TILE + tl.arange(0, TILE)
    own, shrink = load_values(
        values,
        block_table,
        own_tokens,
        own_tokens < end,
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
    )
    total = tl.zeros((TILE,), tl.float32)
    last = tl.minimum(end, first + (tile + 1) * TILE + most_later)
    for start in range(first + tile * TILE, last, LATER_TILE):
        tokens = start + tl.arange(0, LATER_TILE)
        later, later_shrink = load_values(
            values,
            block_table,
            tokens,
            tokens < end,
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
        )
        alike = tl.dot(own, tl.trans(later), input_precision="ieee")
        alike = alike * shrink[:, None] * later_shrink[None, :]
        alike = tl.where(alike > 0, alike, 0.0)  # which no NaN is
        for _ in tl.static_range(SQUARINGS):
            alike = alike * alike
        between = tokens[None, :] - own_tokens[:, None]
        counts = (between > 0) & (between <= most_later)
        total += tl.sum(tl.where(counts, alike, 0.0), axis=1)
    return tl.log(1 + total)


def redundancy_constants(dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Tile size and arithmetic of ``tile_redundancy``.

    EXACT are the narrowest numbers of tensor cores that hold what is stored exactly: fp16 for all
    of one byte. The interpreter multiplies no bf16. float32 is multiplied without tensor cores.
    """
    wide = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16
    exact = {torch.float32: tl.float32, torch.bfloat16: wide}.get(dtype, tl.float16)
    dims = max(int(triton.next_power_of_2(head_dim)), 16)
    # Numbers that are converted lie in registers as float32.
    num_bytes = 2 if dtype in (torch.bfloat16, torch.float16) else 4
    later = min(LATER_BYTES_OF_DIM, LATER_BYTES // dims) // num_bytes
    later = max(later, LEAST_LATER)
    return {
        "HEAD_DIM": head_dim,
        "DIMS": dims,
        "EXACT": exact,
        "SQUARINGS": SQUARINGS,
        "TILE": 2 * later,
        "LATER_TILE": later,
    }
