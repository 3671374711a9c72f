"""The specification of ``score``, and its path where there is no GPU."""

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV, RoundBatch

# Keys are cast to the dtype of the arithmetic a few blocks at a time: tiles of this many
# elements stay in the processor's cache and bound the scratch memory.
TILE_ELEMENTS = 1 << 22


def score(
    kv: PagedKV,
    batch: RoundBatch,
    query_weights: Tensor,
    norm_weights: Tensor,
    interleaved: bool,
    rotary_dim: int,
) -> Tensor:
    """See ``triattention_kernels.score.score``."""
    num_requests, num_layers, num_heads, _ = query_weights.shape
    num_tokens = batch.source_blocks.shape[1] * kv.block_size
    groups = (kv.num_kv_heads, num_heads // kv.num_kv_heads)
    scores = query_weights.new_full((num_requests, num_layers, *groups, num_tokens), float("-inf"))
    norms = torch.unflatten(norm_weights.to(scores.dtype), 1, groups)[:, None]  # [L, 1, H_kv, G, F]
    block_elements = num_layers * kv.num_kv_heads * kv.head_dim * kv.block_size
    tile_blocks = max(1, TILE_ELEMENTS // block_elements)
    for request_idx, num_blocks in enumerate(batch.num_source_blocks):
        weights = torch.unflatten(query_weights[request_idx], 1, groups)[:, None]
        start = 0
        region = batch.source_blocks[request_idx, :num_blocks]
        for blocks in torch.split(region, tile_blocks):
            keys = read_keys(kv, blocks, scores.dtype)
            tile = weights @ keys + norms @ pair_norms(keys, interleaved, rotary_dim)
            end = start + len(blocks) * kv.block_size
            scores[request_idx, ..., start:end] = tile.permute(0, 2, 3, 1, 4).flatten(3)
            start = end
    return scores.flatten(2, 3)


def read_keys(kv: PagedKV, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys of the blocks [n] as [L, n, H_kv, D, block_size] in ``dtype``."""
    keys = kv.keys[:, blocks].permute(0, 1, 2, 5, 6, 3, 4)
    return keys.reshape(*keys.shape[:3], kv.head_dim, kv.block_size).to(dtype)


def pair_norms(keys: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    """``|k'_f|`` of keys [..., D, T] as [..., F, T]."""
    rotated = keys[..., :rotary_dim, :]
    if interleaved:
        return torch.hypot(rotated[..., 0::2, :], rotated[..., 1::2, :])
    return torch.hypot(rotated[..., : rotary_dim // 2, :], rotated[..., rotary_dim // 2 :, :])
