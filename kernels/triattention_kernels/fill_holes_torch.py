"""The specification of ``fill_holes``, and its path where there is no GPU."""

import torch
from torch import Tensor

from triattention_kernels.round_batch import RoundBatch


def fill_holes(kept: Tensor, batch: RoundBatch, block_size: int) -> Tensor:
    """See ``triattention_kernels.fill_holes.fill_holes``; ``kept`` is contiguous."""
    order = torch.zeros_like(kept)
    for request_idx, num_destination in enumerate(batch.num_destination_blocks):
        num_kept = num_destination * block_size
        tokens = kept[request_idx, ..., :num_kept].contiguous()
        places = torch.arange(num_kept, device=kept.device).expand_as(tokens).contiguous()
        num_before = torch.searchsorted(tokens, places)  # kept tokens before each place
        stays = tokens.gather(-1, num_before.clamp(max=num_kept - 1)) == places
        num_inside = (tokens < num_kept).sum(dim=-1, keepdim=True)
        behind = (num_inside + places - num_before).clamp(max=num_kept - 1)
        order[request_idx, ..., :num_kept] = torch.where(stays, places, tokens.gather(-1, behind))
    return order
