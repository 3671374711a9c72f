"""Cached keys and values of a region, and their lengths, as torch operations see them."""

from typing import Literal

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch, region_numbers, tokens_in_order

Part = Literal["keys", "values"]

_SCRATCH_BYTES = 1 << 28
"""What ``region_norms`` takes for its copies of a region, unless one layer alone takes more."""


def region_tokens(kv: PagedKV, region: Tensor, of: Part) -> Tensor:
    """Keys or values of the blocks ``region`` int64 [S] of a cache of one layer, as
    [H_kv, S * block_size, D] float32."""
    tokens, scales = _picked(kv, region, of)
    if scales is not None:
        tokens *= scales[..., None, None]
    return tokens_in_order(tokens)


def region_norms(kv: PagedKV, batch: RoundBatch, of: Part) -> Tensor:
    """Euclidean lengths over the head dims, [R, L, H_kv, S_max * block_size] float32.

    One request's region of as many layers as fit into ``_SCRATCH_BYTES`` is copied at a time.
    Padding blocks of shorter requests are read as well.
    """
    num_tokens = batch.source_blocks.shape[1] * kv.block_size
    # The copy and its squares, float32 both.
    bytes_per_layer = 8 * num_tokens * kv.num_kv_heads * kv.head_dim
    at_most = max(1, _SCRATCH_BYTES // bytes_per_layer)
    norms = []
    for _, part in kv.evenly_spaced(at_most):
        own = []
        for region in batch.source_blocks:
            tokens, scales = _picked(part, region, of)
            norm = tokens.square().sum(dim=(5, 6)).sqrt()
            if scales is not None:
                norm *= scales
            own.append(norm.flatten(3))  # [L, S, H_kv, slots]
        norms.append(torch.stack(own))
    return torch.cat(norms, dim=1).transpose(2, 3).flatten(3)


def _picked(kv: PagedKV, region: Tensor, of: Part) -> tuple[Tensor, Tensor | None]:
    """Copies of the numbers of some blocks, [L, S, H_kv, S1, S2, D1, D2] float32, and of their
    scales [L, S, H_kv, S1, S2] where every token and head has one. Of equally spaced layers."""
    cached = kv.keys if of == "keys" else kv.values
    numbers = region_numbers(cached, region)
    if kv.scales is None:
        return numbers, None
    return numbers, (kv.scales.keys if of == "keys" else kv.scales.values)[:, region]
