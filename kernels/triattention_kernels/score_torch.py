"""The specification of ``score``, and its path where there is no GPU."""

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch

# Keys are cast to the dtype of the arithmetic one block and a few layers at a time: tiles of
# about this many elements stay in the processor's cache. Their memory is taken once: fresh pages
# for every block would cost as much as the arithmetic.
TILE_ELEMENTS = 1 << 20


def score(
    kv: PagedKV,
    batch: RoundBatch,
    centres: Tensor,
    norm_weights: Tensor,
    turns: Tensor,
    interleaved: bool,
    rotary_dim: int,
) -> Tensor:
    """See ``triattention_kernels.score.score``."""
    num_requests, (num_layers, num_heads, _) = batch.num_requests, centres.shape
    num_tokens = batch.source_blocks.shape[1] * kv.block_size
    groups = (kv.num_kv_heads, num_heads // kv.num_kv_heads)
    scores = centres.new_full((num_requests, num_layers, *groups, num_tokens), float("-inf"))
    weights = torch.unflatten(query_weights(centres, turns, interleaved, rotary_dim), 2, groups)
    norms = torch.unflatten(norm_weights.to(scores.dtype), 1, groups)
    tile_layers = max(1, TILE_ELEMENTS // (kv.num_kv_heads * kv.head_dim * kv.block_size))
    for layers, part in kv.evenly_spaced(tile_layers):
        keys = centres.new_empty(part.num_layers, kv.num_kv_heads, kv.head_dim, kv.block_size)
        real, imag = pairs(keys, -2, interleaved, rotary_dim)
        lengths = torch.empty_like(real, memory_format=torch.contiguous_format)
        for request_idx, num_blocks in enumerate(batch.num_source_blocks):
            region = batch.source_blocks[request_idx, :num_blocks].tolist()
            for block_idx, block in enumerate(region):
                read_keys(part, block, keys)
                torch.mul(real, real, out=lengths).addcmul_(imag, imag).sqrt_()
                tile = weights[request_idx, layers] @ keys
                tile += norms[layers] @ lengths
                if part.scales is not None:
                    tile *= part.scales.keys[:, block].flatten(2)[:, :, None]
                tokens = slice(block_idx * kv.block_size, (block_idx + 1) * kv.block_size)
                scores[request_idx, layers, ..., tokens] = tile
    return scores.flatten(2, 3)


def query_weights(centres: Tensor, turns: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    """What a key's dims are multiplied with, [R, L, H, D]: ``qbar_f c_f`` and ``E[q_d]``."""
    weights = centres.repeat(turns.shape[0], 1, 1, 1)
    real, imag = pairs(weights, -1, interleaved, rotary_dim)
    turned = torch.complex(real, imag) * turns.unsqueeze(2)
    real.copy_(turned.real)
    imag.copy_(turned.imag)
    return weights


def read_keys(kv: PagedKV, block: int, keys: Tensor) -> None:
    """Keys of one block of all layers, cast into ``keys`` [L, H_kv, D, block_size]."""
    stored = kv.keys[:, block].permute(0, 1, 4, 5, 2, 3)
    keys.view(stored.shape).copy_(stored)


def pairs(dims: Tensor, dim: int, interleaved: bool, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Views [..., F, ...] of the two dims of every pair, along the (negative) ``dim``."""
    sizes = (rotary_dim // 2, 2) if interleaved else (2, rotary_dim // 2)
    split = torch.unflatten(dims.narrow(dim, 0, rotary_dim), dim, sizes)
    real, imag = split.unbind(dim if interleaved else dim - 1)
    return real, imag
