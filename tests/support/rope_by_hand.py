"""RoPE with plain floats, written from the definition."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triattention_vllm.method.rope import Rotary


def rotate_by_hand(
    query: list[float], position: int, inv_freq: list[float], factor: float, interleaved: bool
) -> list[float]:
    """One head of one token; dims behind those that are rotated stay."""
    num_frequencies = len(inv_freq)
    out = list(query)
    for f, frequency in enumerate(inv_freq):
        i, j = (2 * f, 2 * f + 1) if interleaved else (f, f + num_frequencies)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[i] = factor * (query[i] * cos - query[j] * sin)
        out[j] = factor * (query[j] * cos + query[i] * sin)
    return out


def rotated(rotary: Rotary, queries: Tensor, positions: Sequence[int], layer_idx: int) -> Tensor:
    """Queries [n, H, D] of a layer after RoPE, float64."""
    inv_freq = rotary.inv_freq[layer_idx, : rotary.rotary_dims[layer_idx] // 2].tolist()
    factor = rotary.attention_factor[layer_idx].item()
    heads = [
        [rotate_by_hand(head, position, inv_freq, factor, rotary.interleaved) for head in token]
        for token, position in zip(queries.tolist(), positions, strict=True)
    ]
    return torch.tensor(heads, dtype=torch.float64)
