"""``compact`` on a GPU: every layer, KV head and request at once, in place where that is safe."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import triton
import triton.language as tl
from torch import Tensor

from triattention_kernels.compact_torch import INTEGER_OF_WIDTH
from triattention_kernels.paged import PagedKV
from triattention_kernels.paged_triton import dim_offsets, token_offsets
from triattention_kernels.round_batch import RoundBatch

TILE_ELEMENTS = 4096
MAX_TILE_TOKENS = 256


@triton.jit
def move_rows(
    cache,
    scratch,
    kept,
    source_blocks,
    destination_blocks,
    num_kept,
    head_dim,
    stride_block,
    stride_s1,
    stride_s2,
    stride_d1,
    stride_d2,
    S2: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIMS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
):
    """Cache to cache, cache to scratch or scratch to cache, for one layer, head and request.

    Tiles go up in destination order. A tile is read by all threads before any of them writes,
    and a later tile reads nothing that an earlier one wrote: a survivor's own place is never
    before its destination. Tokens that stay where they are, are neither read nor written.
    """
    dims = tl.arange(0, DIMS_PAD)
    columns = dim_offsets(dims, stride_d1, stride_d2, D2)[None, :]
    for start in range(0, num_kept, TILE):
        slots = start + tl.arange(0, TILE)
        present = slots < num_kept
        tokens = tl.load(kept + slots, mask=present, other=0)
        source = token_offsets(
            source_blocks, tokens, present, stride_block, stride_s1, stride_s2, BLOCK_SIZE, S2
        )
        destination = token_offsets(
            destination_blocks, slots, present, stride_block, stride_s1, stride_s2, BLOCK_SIZE, S2
        )
        mask = (present & (source != destination))[:, None] & (dims < head_dim)[None, :]
        between = scratch + slots.to(tl.int64)[:, None] * head_dim + dims[None, :]
        if READS:
            content = tl.load(cache + source[:, None] + columns, mask=mask)
        else:
            content = tl.load(between, mask=mask)
        if READS and WRITES:
            tl.debug_barrier()
        if WRITES:
            tl.store(cache + destination[:, None] + columns, content, mask=mask)
        else:
            tl.store(between, content, mask=mask)


@triton.jit(do_not_specialize=["num_source_columns", "num_destination_columns"])
def compact_kernel(
    keys,
    values,
    layer_starts,
    scratch,
    source_blocks,
    destination_blocks,
    counts,
    kept,
    num_source_columns,
    num_destination_columns,
    num_kv_heads,
    head_dim,
    kept_stride_request,
    kept_stride_layer,
    kept_stride_head,
    keys_stride_block,
    keys_stride_head,
    keys_stride_s1,
    keys_stride_s2,
    keys_stride_d1,
    keys_stride_d2,
    values_stride_block,
    values_stride_head,
    values_stride_s1,
    values_stride_s2,
    values_stride_d1,
    values_stride_d2,
    KEYS_S2: tl.constexpr,
    KEYS_D2: tl.constexpr,
    VALUES_S2: tl.constexpr,
    VALUES_D2: tl.constexpr,
    LAYER_UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIMS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
):
    """One program: the keys or the values of one layer, KV head and request.

    layer_starts counts LAYER_UNIT elements.
    """
    head = (tl.program_id(0) // 2).to(tl.int64)
    is_value = tl.program_id(0) % 2
    layer = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    kept += request * kept_stride_request + layer * kept_stride_layer + head * kept_stride_head
    source_blocks += request * num_source_columns
    destination_blocks += request * num_destination_columns
    num_kept = tl.load(counts + request * 3 + 1) * BLOCK_SIZE
    start = tl.load(layer_starts + is_value * tl.num_programs(1) + layer) * LAYER_UNIT
    place = ((request * tl.num_programs(1) + layer) * num_kv_heads + head) * 2 + is_value
    scratch += place * num_destination_columns * BLOCK_SIZE * head_dim
    if is_value == 0:
        move_rows(
            keys + start + head * keys_stride_head,
            scratch,
            kept,
            source_blocks,
            destination_blocks,
            num_kept,
            head_dim,
            keys_stride_block,
            keys_stride_s1,
            keys_stride_s2,
            keys_stride_d1,
            keys_stride_d2,
            KEYS_S2,
            KEYS_D2,
            BLOCK_SIZE,
            DIMS_PAD,
            TILE,
            READS,
            WRITES,
        )
    else:
        move_rows(
            values + start + head * values_stride_head,
            scratch,
            kept,
            source_blocks,
            destination_blocks,
            num_kept,
            head_dim,
            values_stride_block,
            values_stride_s1,
            values_stride_s2,
            values_stride_d1,
            values_stride_d2,
            VALUES_S2,
            VALUES_D2,
            BLOCK_SIZE,
            DIMS_PAD,
            TILE,
            READS,
            WRITES,
        )


def compact(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """See ``triattention_kernels.compact.compact``.

    One launch, in place, where ``batch.moves_forward``. Otherwise a destination may be another
    token's source: two launches, all reads into scratch memory of the size of everything kept,
    then all writes. Moves ``traffic.compact_traffic`` bytes.
    """
    key_rows, value_rows = kv.rows
    keys, values = as_integers(key_rows[0], value_rows[0], kv.layer_unit)
    num_requests, num_layers, num_kv_heads, _ = kept.shape
    head_dim = keys.shape[4] * keys.shape[5]
    dims_pad = triton.next_power_of_2(head_dim)
    # Padded rows keep a mask for every element, scattered ones an address: half the tile, so that
    # they stay in registers.
    in_rows = all(view.shape[5] == 1 and view.stride(4) == 1 for view in (keys, values))
    tile_elements = TILE_ELEMENTS // (1 if in_rows and dims_pad == head_dim else 2)
    phases = [(True, True)] if batch.moves_forward else [(True, False), (False, True)]
    scratch_tokens = 0 if batch.moves_forward else kept.numel()
    scratch = keys.new_empty(max(1, scratch_tokens * 2 * head_dim))
    for reads, writes in phases:
        compact_kernel[(num_kv_heads * 2, num_layers, num_requests)](
            keys,
            values,
            kv.layer_starts,
            scratch,
            batch.source_blocks,
            batch.destination_blocks,
            batch.counts,
            kept,
            batch.source_blocks.shape[1],
            batch.destination_blocks.shape[1],
            num_kv_heads,
            head_dim,
            *kept.stride()[:3],
            *keys.stride(),
            *values.stride(),
            KEYS_S2=keys.shape[3],
            KEYS_D2=keys.shape[5],
            VALUES_S2=values.shape[3],
            VALUES_D2=values.shape[5],
            LAYER_UNIT=kv.layer_unit // keys.itemsize,
            BLOCK_SIZE=kv.block_size,
            DIMS_PAD=dims_pad,
            TILE=min(max(16, tile_elements // dims_pad), MAX_TILE_TOKENS),
            READS=reads,
            WRITES=writes,
            num_warps=4,
        )


def as_integers(keys: Tensor, values: Tensor, layer_unit: int) -> tuple[Tensor, Tensor]:
    """The same memory as integers, as wide as the rows of head dims of both allow in every layer.

    keys, values: of one layer, [num_blocks, H_kv, S1, S2, D1, D2]; D1 of the result counts
    integers. layer_unit: bytes that layers are a multiple of apart.
    """
    width = math.gcd(layer_unit, *(_row_alignment(view) for view in (keys, values)))
    dtype = INTEGER_OF_WIDTH[max(width, keys.itemsize)]
    if width <= keys.itemsize:
        return keys.view(dtype), values.view(dtype)
    widened = [view.squeeze(5).view(dtype).unsqueeze(5) for view in (keys, values)]
    return widened[0], widened[1]


def _row_alignment(view: Tensor) -> int:
    """Bytes, at most 8, that start, length and strides of the rows are multiples of."""
    if view.shape[5] != 1 or view.stride(4) != 1:
        return view.itemsize
    steps = (view.shape[4], view.storage_offset(), *view.stride()[:4])
    return math.gcd(8, *(step * view.itemsize for step in steps))
