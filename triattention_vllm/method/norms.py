"""Lengths of the cached keys or values of a batch of rounds."""

import torch
from torch import Tensor
from triattention_kernels import RoundBatch


def region_norms(cached: Tensor, scales: Tensor | None, batch: RoundBatch) -> Tensor:
    """Euclidean lengths over the head dims, [R, L, H_kv, S_max * block_size] float32.

    cached: keys or values of a PagedKV, [L, num_blocks, H_kv, S1, S2, D1, D2]; scales: theirs
    where every token and head has one, [L, num_blocks, H_kv, S1, S2]. One request's region is
    copied at a time. Padding blocks of shorter requests are read as well.
    """
    # torch picks no blocks of fp8 numbers, but of bytes.
    stored = cached.view(torch.uint8) if cached.itemsize == 1 else cached
    norms = []
    for region in batch.source_blocks:
        norm = stored[:, region].view(cached.dtype).float().square().sum(dim=(5, 6)).sqrt()
        if scales is not None:
            norm *= scales[:, region]
        norms.append(norm.flatten(3))  # [L, S, H_kv, slots]
    return torch.stack(norms).transpose(2, 3).flatten(3)
