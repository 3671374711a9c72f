"""Lengths of the cached keys or values of a batch of rounds."""

from typing import Literal

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch


def region_norms(kv: PagedKV, batch: RoundBatch, of: Literal["keys", "values"]) -> Tensor:
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
