"""The specification of ``compact``, and its path where there is no GPU."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch

# Layers are independent. They are moved a few at a time, about this many elements (keys and
# values): that stays in the processor's cache and bounds the scratch memory.
TILE_ELEMENTS = 1 << 22

INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """See ``triattention_kernels.compact.compact``."""
    layer_elements = 2 * kept.shape[0] * kept.shape[2] * kept.shape[3] * kv.head_dim
    tile_layers = max(1, TILE_ELEMENTS // layer_elements)
    for layers, part in kv.evenly_spaced(tile_layers):
        move([as_integers(view) for view in part.rows], batch, kept[:, layers])


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
    """``compact`` for some of the layers. Everything is read before anything is written."""
    writes: list[Callable[[], None]] = []
    for request_idx, num_destination in enumerate(batch.num_destination_blocks):
        num_source = batch.num_source_blocks[request_idx]
        source: list[int] = batch.source_blocks[request_idx, :num_source].tolist()
        destination: list[int] = batch.destination_blocks[request_idx, :num_destination].tolist()
        tokens = kept[request_idx, ..., : num_destination * block_size(views[0])]
        moved = tokens != torch.arange(tokens.shape[-1], device=tokens.device)
        few = destination == source[:num_destination] and 4 * int(moved.sum()) < moved.numel()
        for view in views:
            if few:
                places = moved.nonzero(as_tuple=True)
                content = view[slots_of(view, source, (*places[:2], tokens[places]))]
                writes.append(partial(view.__setitem__, slots_of(view, source, places), content))
            else:
                content = read_tokens(view, source, tokens)
                writes.append(partial(write_blocks, view, destination, content))
    for write in writes:
        write()


def block_size(view: Tensor) -> int:
    """Tokens a block holds."""
    return view.shape[3] * view.shape[4]


def slots_of(view: Tensor, blocks: list[int], places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Index of single tokens in a view: places (layer, head, token of ``blocks``), each [n]."""
    layer, head, token = places
    block = torch.tensor(blocks, device=token.device)[token // block_size(view)]
    slot = token % block_size(view)
    return layer, block, head, slot // view.shape[4], slot % view.shape[4]


def read_tokens(view: Tensor, source: list[int], tokens: Tensor) -> Tensor:
    """Region tokens [L, H_kv, J] of the source blocks as [L, H_kv, J, D1, D2], a copy.

    Whole blocks are unpacked into rows of head dims first; rows are then copied as they are.
    """
    num_layers, _, num_kv_heads, slots, inner_slots, *dims = view.shape
    region = view.new_empty(num_layers, num_kv_heads, len(source), slots, inner_slots, *dims)
    for block_idx, block in enumerate(source):
        region[:, :, block_idx] = view[:, block]
    rows = region.flatten(5).flatten(0, 4)
    num_tokens = len(source) * slots * inner_slots
    first = torch.arange(0, len(rows), num_tokens, device=view.device)
    picked = rows.index_select(0, (tokens.flatten(0, 1) + first[:, None]).flatten())
    return picked.view(*tokens.shape, *dims)


def write_blocks(view: Tensor, destination: list[int], content: Tensor) -> None:
    """Fill the destination blocks [M] with tokens [L, H_kv, M * block_size, D1, D2], in order."""
    slots, inner_slots, _, inner_dims = view.shape[3:]
    blocks = torch.unflatten(content, 2, (len(destination), slots, inner_slots))
    # A copy runs along the dimension that lies closest in the cache; where that is a short run
    # of slots, one slot at a time lets it run along the head dims.
    parts = range(inner_slots) if inner_slots < inner_dims else [slice(None)]
    for block_idx, block in enumerate(destination):
        for part in parts:
            view[:, block, :, :, part] = blocks[:, :, block_idx, :, part]
