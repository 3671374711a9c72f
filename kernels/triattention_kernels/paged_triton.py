"""Addresses in a paged cache, shared by the kernels that read or write one."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def token_offsets(
    block_table,
    tokens,
    present,
    stride_block,
    stride_s1,
    stride_s2,
    BLOCK_SIZE: tl.constexpr,
    S2: tl.constexpr,
):
    """Element offsets [T] int64 of tokens that are counted from the first block of a row.

    tokens: [T] integers; where ``present`` is false nothing is read and the offset is block 0's.
    """
    blocks = tl.load(block_table + tokens // BLOCK_SIZE, mask=present, other=0)
    slots = (tokens % BLOCK_SIZE).to(tl.int64)
    return blocks * stride_block + (slots // S2) * stride_s1 + (slots % S2) * stride_s2


@triton.jit
def dim_offsets(dims, stride_d1, stride_d2, D2: tl.constexpr):
    """Element offsets [D] of head dims inside a token; contiguous where D2 = stride_d1 = 1."""
    return (dims // D2) * stride_d1 + (dims % D2) * stride_d2
