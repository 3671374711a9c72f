"""Scores in Python's complex numbers and how far others may be from them; redundancy in lists."""

import math
from itertools import product

import torch
from torch import Tensor
from triattention_kernels import RoundBatch


def random_weights(
    shape: tuple[int, int, int, int], rotary_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, norm weights and turns of (R, L, H, D); every layer turns by angles of its own."""
    generator = torch.Generator().manual_seed(1)
    num_requests, num_layers, num_heads, head_dim = shape
    heads, frequencies = (num_layers, num_heads), rotary_dim // 2
    centres = torch.randn(*heads, head_dim, generator=generator, dtype=torch.float64)
    norms = torch.rand(*heads, frequencies, generator=generator, dtype=torch.float64)
    size = (num_requests, num_layers, frequencies)
    turns = torch.randn(size, generator=generator, dtype=torch.complex128)
    return centres.to(dtype), norms.to(dtype), turns.to(dtype.to_complex())


def oracle(
    keys: Tensor,
    batch: RoundBatch,
    centres: Tensor,
    norm_weights: Tensor,
    turns: Tensor,
    interleaved: bool,
    rotary_dim: int,
) -> Tensor:
    """Python complex numbers, one key at a time. keys: [L, num_blocks, H_kv, block_size, D]."""
    num_requests, (num_layers, num_heads, head_dim) = len(turns), centres.shape
    block_size, group = keys.shape[3], num_heads // keys.shape[2]
    num_tokens = batch.source_blocks.shape[1] * block_size
    scores = torch.full(
        (num_requests, num_layers, num_heads, num_tokens), -math.inf, dtype=torch.float64
    )
    num_frequencies = rotary_dim // 2
    pairs = [
        (2 * f, 2 * f + 1) if interleaved else (f, f + num_frequencies)
        for f in range(num_frequencies)
    ]
    for r, layer, head in product(range(num_requests), range(num_layers), range(num_heads)):
        centre, turn = centres[layer, head].tolist(), turns[r, layer].tolist()
        norms = norm_weights[layer, head].tolist()
        for token in range(batch.num_source_blocks[r] * block_size):
            block = int(batch.source_blocks[r, token // block_size])
            key = keys[layer, block, head // group, token % block_size].tolist()
            terms = [centre[d] * key[d] for d in range(rotary_dim, head_dim)]
            for (re, im), norm, by in zip(pairs, norms, turn, strict=True):
                rotated = complex(key[re], key[im])
                weight = complex(centre[re], centre[im]) * by
                terms.append((weight * rotated.conjugate()).real + norm * abs(rotated))
            scores[r, layer, head, token] = math.fsum(terms)
    return scores


def assert_close_by_row(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors relative to the largest score of the row; -inf in the same places."""
    assert torch.equal(found.isneginf(), expected.isneginf())
    error = (found.double() - expected).masked_fill(expected.isneginf(), 0.0).abs()
    scale = expected.masked_fill(expected.isneginf(), 0.0).abs().amax(dim=-1, keepdim=True)
    assert (error <= tolerance * scale).all(), float((error / scale).max())


def redundancy_by_lists(values: list[list[float]], most_later: int = 16_384) -> list[float]:
    """Of candidates' values [T][D]: the logarithm of how often the next ones say it."""
    unit = [[x / (math.hypot(*value) or 1.0) for x in value] for value in values]
    found = []
    for t, own in enumerate(unit):
        following = unit[t + 1 : t + 1 + most_later]
        cosines = [sum(map(math.prod, zip(own, later, strict=True))) for later in following]
        found.append(math.log(1 + sum(max(0.0, cosine) ** 8 for cosine in cosines)))
    return found
