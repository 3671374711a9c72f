"""The specification of redundancy, and its path where there is no GPU."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from triattention_kernels.paged import PagedKV
from triattention_kernels.region import region_numbers, tokens_in_order
from triattention_kernels.round_batch import RoundBatch

SQUARINGS = 3
"""A cosine of 0.9 counts 0.43, one of 0.5 counts 0.004."""
CHUNK = 128


def redundancy(kv: PagedKV, batch: RoundBatch, weight: float, most_later: int) -> Tensor:
    """See ``triattention_kernels.redundancy.redundancy``."""
    num_tokens = batch.source_blocks.shape[1] * kv.block_size
    shape = (batch.num_requests, kv.num_layers, kv.num_kv_heads, num_tokens)
    found = torch.zeros(shape, device=kv.values.device)
    for layers, part in kv.evenly_spaced(at_most=1):
        for request_idx, first in enumerate(batch.first_candidate):
            num_blocks = batch.num_source_blocks[request_idx]
            region = batch.source_blocks[request_idx, :num_blocks]
            values = tokens_in_order(region_numbers(part.values, region))
            end = num_blocks * kv.block_size
            own = of_values(values[:, first:], most_later)
            found[request_idx, layers.start, :, first:end] = weight * own
    return found


def of_values(values: Tensor, most_later: int) -> Tensor:
    """``r`` [H, T] of values [H, T, D] float32 in order. Time goes with T times the later ones that
    are looked at; chunks of t stay in the processor's cache. What is not finite has no direction.
    """
    directions = normalize(values, dim=-1).nan_to_num_(nan=0.0)
    found = []
    for start in range(0, values.shape[1], CHUNK):
        own = directions[:, start : start + CHUNK]
        later = directions[:, start : start + CHUNK + most_later]
        alike = (own @ later.transpose(1, 2)).clamp_(min=0)  # [H, t, u]
        for _ in range(SQUARINGS):
            alike.square_()
        found.append(alike.triu_(1).tril_(most_later).sum(-1))
    return torch.cat(found, dim=1).log1p()
