"""Cached keys and values of a region, and their lengths, as torch operations see them."""

from typing import Literal

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

Part = Literal["keys", "values"]


def region_tokens(kv: PagedKV, region: Tensor, of: Part) -> Tensor:
    """Keys or values of the blocks ``region`` int64 [S] of a cache of one layer, as
    [H_kv, S * block_size, D] float32."""
    cached = kv.keys if of == "keys" else kv.values
    stored = cached[0]
    # torch picks no blocks of fp8 numbers, but of bytes.
    if stored.itemsize == 1:
        stored = stored.view(torch.uint8)
    tokens = stored[region].view(cached.dtype).float()  # [S, H_kv, S1, S2, D1, D2]
    if kv.scales is not None:
        scales = kv.scales.keys if of == "keys" else kv.scales.values
        tokens *= scales[0, region][..., None, None]
    return tokens.transpose(0, 1).flatten(4).flatten(1, 3)


def region_norms(kv: PagedKV, batch: RoundBatch, of: Part) -> Tensor:
    """Euclidean lengths over the head dims, [R, L, H_kv, S_max * block_size] float32.

    One request's region of equally spaced layers is copied at a time. Padding blocks of shorter
    requests are read as well.
    """
    norms = []
    for _, part in kv.evenly_spaced():
        is_key, scales = of == "keys", part.scales
        cached = part.keys if is_key else part.values
        # torch picks no blocks of fp8 numbers, but of bytes.
        stored = cached.view(torch.uint8) if cached.itemsize == 1 else cached
        own = []
        for region in batch.source_blocks:
            norm = stored[:, region].view(cached.dtype).float().square().sum(dim=(5, 6)).sqrt()
            if scales is not None:
                norm *= (scales.keys if is_key else scales.values)[:, region]
            own.append(norm.flatten(3))  # [L, S, H_kv, slots]
        norms.append(torch.stack(own))
    return torch.cat(norms, dim=1).transpose(2, 3).flatten(3)
