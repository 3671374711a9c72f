"""The specification of ``compact``, and its path where there is no GPU."""

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV, RoundBatch

# Tokens are moved as integers of the same width: NaN payloads survive, and dtypes without
# arithmetic (fp8) need no support of their own.
INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """See ``triattention_kernels.compact.compact``."""
    views = [view.view(INTEGER_OF_WIDTH[view.itemsize]) for view in (kv.keys, kv.values)]
    moves = []
    for request_idx, num_destination in enumerate(batch.num_destination_blocks):
        source = batch.source_blocks[request_idx]
        destination = batch.destination_blocks[request_idx, :num_destination]
        tokens = kept[request_idx, ..., : num_destination * kv.block_size]
        moves += [(view, destination, read_tokens(view, source, tokens)) for view in views]
    for view, destination, content in moves:
        write_blocks(view, destination, content)


def read_tokens(view: Tensor, source: Tensor, tokens: Tensor) -> Tensor:
    """Region tokens [L, H_kv, J] of the source blocks as [L, H_kv, J, D1, D2], a copy."""
    num_layers, _, num_kv_heads, slots, inner_slots, _, _ = view.shape
    layers = torch.arange(num_layers, device=view.device)[:, None, None]
    heads = torch.arange(num_kv_heads, device=view.device)[:, None]
    blocks = source[tokens // (slots * inner_slots)]
    slot = tokens % (slots * inner_slots)
    return view[layers, blocks, heads, slot // inner_slots, slot % inner_slots]


def write_blocks(view: Tensor, destination: Tensor, content: Tensor) -> None:
    """Fill the destination blocks [M] with tokens [L, H_kv, M * block_size, D1, D2], in order."""
    slots, inner_slots = view.shape[3:5]
    blocks = torch.unflatten(content, 2, (len(destination), slots, inner_slots))
    view[:, destination] = blocks.transpose(1, 2)
