"""The specification of ``compact``, and its path where there is no GPU."""

import math

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV, RoundBatch

# Layers are independent. They are moved a few at a time, about this many elements (keys and
# values): that stays in the processor's cache and bounds the scratch memory.
TILE_ELEMENTS = 1 << 22

INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """See ``triattention_kernels.compact.compact``."""
    views = [as_integers(view) for view in (kv.keys, kv.values)]
    layer_elements = 2 * kept.shape[0] * kept.shape[2] * kept.shape[3] * kv.head_dim
    tile_layers = max(1, TILE_ELEMENTS // layer_elements)
    for start in range(0, kv.num_layers, tile_layers):
        layers = slice(start, start + tile_layers)
        move([view[layers] for view in views], batch, kept[:, layers])


def as_integers(view: Tensor) -> Tensor:
    """The same memory as integers, as wide as the head dims that lie side by side allow.

    Integers keep the payloads of NaN, need no arithmetic on the dtype (fp8), and are fewer.
    """
    if view.shape[6] == 1:
        view = view.squeeze(6).unsqueeze(5)  # a row of head dims: D1 = 1, D2 = D
    width = view.itemsize
    if view.stride(6) == 1:
        steps = (view.shape[6], view.storage_offset(), *view.stride()[:6])
        width = math.gcd(8, *(step * width for step in steps))
    return view.view(INTEGER_OF_WIDTH[width])


def move(views: list[Tensor], batch: RoundBatch, kept: Tensor) -> None:
    """``compact`` for some of the layers."""
    moves = []
    for request_idx, num_destination in enumerate(batch.num_destination_blocks):
        source = batch.source_blocks[request_idx]
        destination = batch.destination_blocks[request_idx, :num_destination]
        for view in views:
            tokens = kept[request_idx, ..., : num_destination * view.shape[3] * view.shape[4]]
            moves.append((view, destination, read_tokens(view, source, tokens)))
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
    view = view.transpose(1, 2)
    # In the order of memory whole blocks are copied, not single elements.
    order = (0, 1, 2, *sorted(range(3, 7), key=view.stride, reverse=True))
    view.permute(order)[:, :, destination] = blocks.permute(order).contiguous()
