"""The specification of ``score``, and its path where there is no GPU."""

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV, RoundBatch

# Keys are cast to the dtype of the arithmetic one block and a few layers at a time: tiles of
# about this many elements stay in the processor's cache and bound the scratch memory.
TILE_ELEMENTS = 1 << 20


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
    weights = torch.unflatten(query_weights, 2, groups)
    norms = torch.unflatten(norm_weights.to(scores.dtype), 1, groups)
    tile_layers = max(1, TILE_ELEMENTS // (kv.num_kv_heads * kv.head_dim * kv.block_size))
    for request_idx, num_blocks in enumerate(batch.num_source_blocks):
        region = batch.source_blocks[request_idx, :num_blocks].tolist()
        for start in range(0, num_layers, tile_layers):
            layers = slice(start, start + tile_layers)
            for block_idx, block in enumerate(region):
                keys = read_keys(kv, layers, block, scores.dtype)
                tile = weights[request_idx, layers] @ keys
                tile += norms[layers] @ pair_norms(keys, interleaved, rotary_dim)
                if kv.scales is not None:
                    tile *= kv.scales.keys[layers, block].flatten(2)[:, :, None]
                tokens = slice(block_idx * kv.block_size, (block_idx + 1) * kv.block_size)
                scores[request_idx, layers, ..., tokens] = tile
    return scores.flatten(2, 3)


def read_keys(kv: PagedKV, layers: slice, block: int, dtype: torch.dtype) -> Tensor:
    """Keys of one block of some layers as [L, H_kv, D, block_size] in ``dtype``, a copy."""
    keys = kv.keys[layers, block].permute(0, 1, 4, 5, 2, 3)
    return (
        torch.empty(keys.shape, dtype=dtype, device=keys.device)
        .copy_(keys)
        .flatten(4)
        .flatten(2, 3)
    )


def pair_norms(keys: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    """``|k'_f|`` of keys [..., D, T] as [..., F, T]."""
    rotated = keys[..., :rotary_dim, :]
    if interleaved:
        return torch.hypot(rotated[..., 0::2, :], rotated[..., 1::2, :])
    return torch.hypot(rotated[..., : rotary_dim // 2, :], rotated[..., rotary_dim // 2 :, :])
