"""``score`` on a GPU: one launch for all layers, requests, KV heads and tokens."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention_kernels.errors import ArgumentError
from triattention_kernels.paged import PagedKV
from triattention_kernels.paged_triton import as_stored, dim_offsets, to_float32, token_offsets
from triattention_kernels.round_batch import RoundBatch

# Below this many query heads a KV head, a sum over the dims costs less than padding them to
# what the tensor cores take.
DOT_FROM_GROUP = 4
TILE_TOKENS = 64
TILE_DIMS = 64
# Tensor cores cut off what does not fit when they add. Sums of so many products each are added up
# outside of them, rounded to nearest: longer ones would err more than sums in float32 do.
DOT_TERMS = 16
# Query heads times head dim. Of an unrolled loop sm_100 keeps the sums of all products at once, and
# has room for 512 columns of them; other devices spill.
MOST_UNROLLED = 4096


@triton.jit
def turned(centres, real, imag, cosine, sine, present):
    """``qbar_f c_f`` as real and imaginary parts; centres that are not ``present`` are 0."""
    x = tl.load(centres + real, mask=present, other=0.0)
    y = tl.load(centres + imag, mask=present, other=0.0)
    return x * cosine - y * sine, x * sine + y * cosine


@triton.jit(do_not_specialize=["num_tiles", "num_columns"])
def score_kernel(
    keys,
    scales,
    layer_starts,
    source_blocks,
    counts,
    centres,
    norm_weights,
    turns,
    scores,
    num_tiles,
    num_tokens,
    num_columns,
    num_heads,
    stride_block,
    stride_head,
    stride_s1,
    stride_s2,
    stride_d1,
    stride_d2,
    centre_stride_layer,
    centre_stride_head,
    norm_stride_layer,
    norm_stride_head,
    turn_stride_request,
    turn_stride_layer,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    S2: tl.constexpr,
    D2: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    LAYER_UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PAIRS_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of tokens of one KV head, layer and request, all its query heads.

    layer_starts and strides of blocks, heads and slots count LAYER_UNIT and STRIDE_UNIT elements.
    Arguments that change from round to round are not specialised: no round waits for a compiler.
    """
    kv_head = tl.program_id(0) // num_tiles
    layer = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    tokens = (tl.program_id(0) % num_tiles) * TILE + tl.arange(0, TILE)
    in_region = tokens < tl.load(counts + request * 3) * BLOCK_SIZE
    head = kv_head.to(tl.int64) * GROUP
    heads = tl.arange(0, GROUP_PAD)

    places = tl.load(layer_starts + layer) * LAYER_UNIT + kv_head.to(tl.int64) * stride_head
    places += token_offsets(
        source_blocks + request * num_columns,
        tokens,
        in_region,
        stride_block,
        stride_s1,
        stride_s2,
        BLOCK_SIZE,
        S2,
    )
    row = keys + (places * STRIDE_UNIT)[:, None]
    centres += layer * centre_stride_layer + head * centre_stride_head
    norms = norm_weights + layer * norm_stride_layer + head * norm_stride_head
    turns += request * turn_stride_request + layer * turn_stride_layer
    # Without tensor cores one head at a time; with them one column of a product each.
    head_centres = centres + heads[None, :] * centre_stride_head
    head_norms = norms + heads[None, :] * norm_stride_head
    total = tl.zeros((TILE, GROUP_PAD), tl.float32)
    for start in (tl.static_range if UNROLL else tl.range)(0, ROTARY_DIM // 2, PAIRS_TILE):
        pairs = start + tl.arange(0, PAIRS_TILE)
        present = pairs < ROTARY_DIM // 2
        # Neighbours: both loads touch the same sectors, the second finds them in L1.
        real = 2 * pairs if INTERLEAVED else pairs
        imag = real + 1 if INTERLEAVED else pairs + ROTARY_DIM // 2
        mask = in_region[:, None] & present[None, :]
        x = tl.load(row + dim_offsets(real, stride_d1, stride_d2, D2)[None, :], mask, other=0)
        y = tl.load(row + dim_offsets(imag, stride_d1, stride_d2, D2)[None, :], mask, other=0)
        x = to_float32(x, KEY_FORMAT)
        y = to_float32(y, KEY_FORMAT)
        norm = tl.sqrt(x * x + y * y)
        cosine = tl.load(turns + 2 * pairs, mask=present, other=0.0)
        sine = tl.load(turns + 2 * pairs + 1, mask=present, other=0.0)
        if PRECISION == "sum":
            for g in tl.static_range(GROUP):
                own = centres + g * centre_stride_head
                along, across = turned(own, real, imag, cosine, sine, present)
                length = tl.load(norms + g * norm_stride_head + pairs, mask=present, other=0.0)
                terms = x * along[None, :] + y * across[None, :] + norm * length[None, :]
                total += tl.where(heads[None, :] == g, tl.sum(terms, axis=1)[:, None], 0.0)
        else:
            weighs = present[:, None] & (heads < GROUP)[None, :]
            along, across = turned(
                head_centres,
                real[:, None],
                imag[:, None],
                cosine[:, None],
                sine[:, None],
                weighs,
            )
            length = tl.load(head_norms + pairs[:, None], mask=weighs, other=0.0)
            total = tl.dot(x, along, total, input_precision=PRECISION)
            total = tl.dot(y, across, total, input_precision=PRECISION)
            total = tl.dot(norm, length, total, input_precision=PRECISION)
    for start in (tl.static_range if UNROLL else tl.range)(ROTARY_DIM, HEAD_DIM, REST_TILE):
        dims = start + tl.arange(0, REST_TILE)
        present = dims < HEAD_DIM
        mask = in_region[:, None] & present[None, :]
        x = tl.load(row + dim_offsets(dims, stride_d1, stride_d2, D2)[None, :], mask, other=0)
        x = to_float32(x, KEY_FORMAT)
        if PRECISION == "sum":
            for g in tl.static_range(GROUP):
                plain = tl.load(centres + g * centre_stride_head + dims, mask=present, other=0.0)
                sums = tl.sum(x * plain[None, :], axis=1)
                total += tl.where(heads[None, :] == g, sums[:, None], 0.0)
        else:
            weighs = present[:, None] & (heads < GROUP)[None, :]
            plain = tl.load(head_centres + dims[:, None], mask=weighs, other=0.0)
            total = tl.dot(x, plain, total, input_precision=PRECISION)

    if SCALED:
        total *= tl.load(scales + places, mask=in_region, other=0.0)[:, None]

    out = scores + ((request * tl.num_programs(1) + layer) * num_heads + head) * num_tokens
    tl.store(
        out + heads[None, :].to(tl.int64) * num_tokens + tokens[:, None],
        tl.where(in_region[:, None], total, float("-inf")),
        mask=(heads < GROUP)[None, :] & (tokens < num_tokens)[:, None],
    )


def score(
    kv: PagedKV,
    batch: RoundBatch,
    centres: Tensor,
    norm_weights: Tensor,
    turns: Tensor,
    interleaved: bool,
    rotary_dim: int,
) -> Tensor:
    """See ``triattention_kernels.score.score``. One launch; weights and sums are float32.

    Moves ``traffic.score_traffic`` bytes: every key of the regions once. Each program turns the
    centres of its heads itself; those, the norm weights and the turns come from L2.
    """
    check_weights(centres, norm_weights, turns)
    keys, key_format = as_stored("keys", kv.keys)
    # Scales lie among the one-byte numbers, four of which are as long as one of them. Strides in
    # this unit also tell the compiler that four numbers can be loaded at once.
    unit = 1 if kv.scales is None else 4
    num_layers, num_heads, head_dim = centres.shape
    num_columns = batch.source_blocks.shape[1]
    num_tokens = num_columns * kv.block_size
    scores = centres.new_empty(batch.num_requests, num_layers, num_heads, num_tokens)
    constants = score_constants(num_heads // kv.num_kv_heads, head_dim, rotary_dim)
    num_tiles = triton.cdiv(num_tokens, TILE_TOKENS)
    parts = torch.view_as_real(turns)
    score_kernel[(num_tiles * kv.num_kv_heads, num_layers, batch.num_requests)](
        keys,
        keys if kv.scales is None else kv.scales.keys,
        kv.layer_starts,
        batch.source_blocks,
        batch.counts,
        centres,
        norm_weights,
        parts,
        scores,
        num_tiles,
        num_tokens,
        num_columns,
        num_heads,
        *(stride // unit for stride in keys.stride()[1:5]),
        *keys.stride()[5:],
        *centres.stride()[:2],
        *norm_weights.stride()[:2],
        *parts.stride()[:2],
        BLOCK_SIZE=kv.block_size,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=interleaved,
        S2=kv.keys.shape[4],
        D2=kv.keys.shape[6],
        KEY_FORMAT=key_format,
        LAYER_UNIT=kv.layer_unit // (keys.itemsize * unit),
        STRIDE_UNIT=unit,
        SCALED=kv.scales is not None,
        **constants,
        num_warps=4,
    )
    return scores


def check_weights(centres: Tensor, norm_weights: Tensor, turns: Tensor) -> None:
    """Raise ArgumentError for what the kernel does not read."""
    for name, weights, dtype in (
        ("centres", centres, torch.float32),
        ("norm_weights", norm_weights, torch.float32),
        ("turns", turns, torch.complex64),
    ):
        if weights.dtype != dtype or weights.stride(-1) != 1:
            raise ArgumentError(
                f"{name} is {weights.dtype} with strides {list(weights.stride())}; the triton"
                f" implementation takes {dtype} with a contiguous last dimension: cast it, or"
                ' choose implementation="torch"'
            )


def score_constants(group: int, head_dim: int, rotary_dim: int) -> dict[str, int | str | bool]:
    """Tile sizes and arithmetic of ``score_kernel``.

    On NVIDIA tensor cores float32 operands are split in three TF32 products (``tf32x3``), whose
    error is that of float32 sums; AMD's multiply float32 as it is.
    """
    on_amd = torch.version.hip is not None
    uses_dot = group >= DOT_FROM_GROUP
    # The smallest shapes that tensor cores multiply.
    smallest_group = (16 if on_amd else 8) if uses_dot else 1
    smallest_dims = 16 if uses_dot else 1

    def tile(num_dims: int) -> int:
        padded = int(triton.next_power_of_2(max(num_dims, 1)))
        return min(max(padded, smallest_dims), DOT_TERMS if uses_dot else TILE_DIMS)

    padded_group = max(int(triton.next_power_of_2(group)), smallest_group)
    return {
        "GROUP": group,
        "GROUP_PAD": padded_group,
        "UNROLL": not uses_dot or padded_group * head_dim <= MOST_UNROLLED,
        "PAIRS_TILE": tile(rotary_dim // 2),
        "REST_TILE": tile(head_dim - rotary_dim),
        "PRECISION": ("ieee" if on_amd else "tf32x3") if uses_dot else "sum",
        "TILE": TILE_TOKENS,
    }
