"""Addresses and numbers in a paged cache, shared by the kernels that read or write one."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention_kernels.errors import ArgumentError

# fp8 numbers are read as bytes and converted by their bits, so that every device can.
FORMATS = {
    torch.float32: "native",
    torch.float16: "native",
    torch.bfloat16: "native",
    torch.int8: "native",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
}
# 2^(127 - 7): float32 exponents are biased by 127, those of e4m3 by 7, of AMD's e4m3fnuz by 8.
E4M3_BIAS = tl.constexpr(2.0**120)
E4M3FNUZ_BIAS = tl.constexpr(2.0**119)


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


@triton.jit
def to_float32(raw, FORMAT: tl.constexpr):
    """Exact; bf16 has no arithmetic of its own on every device that runs this."""
    if FORMAT == "e4m3" or FORMAT == "e4m3fnuz":
        sign = (raw & 0x80).to(tl.uint32) << 24
        magnitude = (raw & 0x7F).to(tl.uint32)
        # Exponent and mantissa land in float32's fields, and the product corrects the bias.
        number = (magnitude << 20).to(tl.float32, bitcast=True)
        if FORMAT == "e4m3":
            number = tl.where(magnitude == 0x7F, float("nan"), number * E4M3_BIAS)
        else:  # the place of -0 is its only NaN
            number = tl.where(raw == 0x80, float("nan"), number * E4M3FNUZ_BIAS)
        number = (number.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    elif FORMAT == "e5m2":
        number = (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = raw.to(tl.float32)
    return number


def as_stored(what: str, numbers: Tensor) -> tuple[Tensor, str]:
    """The same memory as a kernel reads it, and the FORMAT of its numbers.

    what: their name, for the ArgumentError that is raised for numbers that no kernel reads.
    """
    found = FORMATS.get(numbers.dtype)
    if found is None:
        raise ArgumentError(
            f"{what} are {numbers.dtype}; the triton implementation reads"
            f' {", ".join(map(str, FORMATS))}: choose implementation="torch"'
        )
    return (numbers if found == "native" else numbers.view(torch.uint8)), found
