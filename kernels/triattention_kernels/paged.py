"""What the three operations read and write: paged keys and values."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from triattention_kernels.errors import ArgumentError
from triattention_kernels.host_copy import on_device
from triattention_kernels.layers import byte_starts

CpuLayout = Literal["vec", "vec16", "amx"]

# vLLM's AMX packing keeps 16 slots (keys) or 16 dims (values) together, in pairs of the other.
AMX_GROUP = 16

# vLLM's ROCm paged attention keeps as many bytes of a key's head dims together.
ROCM_GROUP_BYTES = 16

SCALE_BYTES = 4  # float32

# Device loads take at most this much at a time; a better alignment of layers helps no more.
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class TokenHeadScales:
    """Scales of a cache that quantises every token and KV head by itself.

    keys, values: [L, num_blocks, H_kv, S1, S2] float32 each, with the strides of the one-byte
        numbers in units of their own 4 bytes; a key is its numbers times its scale.
    rows: everything that is stored of a token's key and of its value, head dims first and the
        bytes of the scale behind them, [L, num_blocks, H_kv, S1, S2, D + 4, 1] uint8 each.
    """

    keys: Tensor
    values: Tensor
    rows: tuple[Tensor, Tensor]

    def of_layers(self, layers: slice) -> "TokenHeadScales":
        """Those of some layers."""
        key_rows, value_rows = self.rows
        rows = (key_rows[layers], value_rows[layers])
        return TokenHeadScales(self.keys[layers], self.values[layers], rows)


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of all layers of one KV-cache group, as strided views of the cache.

    keys, values: [L, num_blocks, H_kv, S1, S2, D1, D2], never copies: writing through them
    writes the cache. A token's slot in its block is ``s1 * S2 + s2``, its head dim
    ``d1 * D2 + d2``; keys and values may split the two differently. Layouts that store a
    token's head dims as one row have S2 = D2 = 1. Their dtype is that of the numbers: the bytes
    of an fp8 cache are viewed as the fp8 dtype that they are written in. A factor that is the
    same for all tokens of a layer and head (fp8 per tensor, per head) changes no ranking and is
    not known here.

    scales: of a cache that keeps one for every token and head, else None.
    further: more layers, behind these, that are not equally spaced with them (``joined``). What
    reads ``keys`` or ``values`` of all layers goes through ``evenly_spaced``.
    """

    keys: Tensor
    values: Tensor
    scales: TokenHeadScales | None = None
    further: tuple["PagedKV", ...] = ()

    def __post_init__(self) -> None:
        sizes = []
        for name, view in (("keys", self.keys), ("values", self.values)):
            if view.dim() != 7:
                raise ArgumentError(
                    f"{name} has shape {list(view.shape)}; 7 dimensions are needed:"
                    " [L, num_blocks, H_kv, S1, S2, D1, D2]"
                )
            slots, dims = view.shape[3] * view.shape[4], view.shape[5] * view.shape[6]
            sizes.append((*view.shape[:3], slots, dims, view.dtype, view.device))
        if sizes[0] != sizes[1]:
            raise ArgumentError(
                "keys and values differ in (L, num_blocks, H_kv, block size, head dim, dtype,"
                f" device): {sizes[0]} and {sizes[1]}; give two views of the same cache"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(part.keys.shape[0] for part in self._parts)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the null block included."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """H_kv."""
        return self.keys.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return self.keys.shape[3] * self.keys.shape[4]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.shape[5] * self.keys.shape[6]

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All that belongs to a token, of its key and of its value: what ``compact`` moves."""
        return (self.keys, self.values) if self.scales is None else self.scales.rows

    @property
    def _parts(self) -> tuple["PagedKV", ...]:
        return (self, *self.further)

    def evenly_spaced(self, at_most: int | None = None) -> Iterator[tuple[slice, "PagedKV"]]:
        """All layers in order, as caches of equally spaced layers, ``at_most`` in each, and which
        of the layers they are.
        """
        start = 0
        for part in self._parts:
            num_layers = part.keys.shape[0]
            step = at_most or num_layers
            for first in range(0, num_layers, step):
                own = slice(first, min(first + step, num_layers))
                scales = None if part.scales is None else part.scales.of_layers(own)
                yield (
                    slice(start + own.start, start + own.stop),
                    PagedKV(part.keys[own], part.values[own], scales),
                )
            start += num_layers

    @cached_property
    def layer_starts(self) -> Tensor:
        """Where keys and values of every layer start, counted in ``layer_unit`` bytes from those of
        the first layer, [2, L] int64 on the device; copied there once, without waiting for it.
        """
        starts = [[start // self.layer_unit for start in row] for row in self._byte_starts]
        return on_device(starts, torch.int64, self.keys.device)

    @cached_property
    def layer_unit(self) -> int:
        """Bytes, at most 16, that layers are a multiple of apart."""
        return math.gcd(ALIGNED_BYTES, *(start for row in self._byte_starts for start in row))

    @cached_property
    def _byte_starts(self) -> tuple[list[int], list[int]]:
        return (
            byte_starts([part.keys for part in self._parts]),
            byte_starts([part.values for part in self._parts]),
        )

    @classmethod
    def joined(cls, parts: Sequence["PagedKV"]) -> "PagedKV":
        """One cache of the layers of several, wherever these lie in memory.

        Raises ArgumentError where the parts differ in more than their number of layers.
        """
        if not parts:
            raise ArgumentError("no caches to join; give at least one")
        shapes = [part._beside_layers for part in parts]
        for idx, found in enumerate(shapes):
            if found != shapes[0]:
                raise ArgumentError(
                    f"cache {idx} has (shape, strides, dtype, device) {found} beside its layers,"
                    f" cache 0 {shapes[0]}; join only caches that are alike"
                )
        first, *others = (part for joined in parts for _, part in joined.evenly_spaced())
        kv = cls(first.keys, first.values, first.scales, tuple(others))
        needed = first.keys.itemsize if first.scales is None else SCALE_BYTES
        if kv.layer_unit % needed:
            raise ArgumentError(
                f"the layers lie a multiple of {kv.layer_unit} bytes apart; a multiple of {needed}"
                " is needed, the size of what is read in them: allocate them aligned"
            )
        return kv

    @property
    def _beside_layers(self) -> tuple[object, ...]:
        views = (self.keys, self.values, *self.rows)
        return tuple(
            (tuple(view.shape[1:]), view.stride()[1:], view.dtype, view.device) for view in views
        )

    @classmethod
    def from_blocks(cls, blocks: Tensor) -> "PagedKV":
        """Views of blocks that store one row per token: ``blocks[..., :D]`` is its key and
        ``blocks[..., D:]`` its value.

        blocks: [L, num_blocks, H_kv, block_size, 2 * D], any strides.
        """
        _check_blocks(blocks)
        keys, values = torch.unflatten(blocks, -1, (2, -1)).unbind(-2)
        return cls(keys[..., None, :, None], values[..., None, :, None])

    @classmethod
    def from_scaled_blocks(cls, blocks: Tensor, dtype: torch.dtype) -> "PagedKV":
        """Views of blocks whose tokens carry scales: ``blocks[..., :D]`` is a token's key, the
        next 4 bytes are its float32 scale, and its value follows in the same way.

        blocks: [L, num_blocks, H_kv, block_size, 2 * (D + 4)] of one byte each, the last
        dimension contiguous, every token's row at a multiple of 4 bytes. dtype: int8 or fp8,
        what the bytes of keys and values stand for.
        Source: vLLM ``TritonAttentionImpl._ensure_scale_caches``.
        """
        _check_blocks(blocks)
        steps = (blocks.storage_offset(), *blocks.stride()[:4], blocks.shape[4] // 2)
        if blocks.itemsize != 1 or blocks.stride(4) != 1 or any(s % SCALE_BYTES for s in steps):
            raise ArgumentError(
                f"blocks is {blocks.dtype} with strides {list(blocks.stride())} from element"
                f" {blocks.storage_offset()}; one byte an element, a contiguous last dimension and"
                f" rows at multiples of {SCALE_BYTES} bytes are needed: float32 scales lie in them"
            )
        key_rows, value_rows = torch.unflatten(blocks.view(torch.uint8), -1, (2, -1)).unbind(-2)
        keys, values = (row[..., :-SCALE_BYTES].view(dtype) for row in (key_rows, value_rows))
        return cls(
            keys[..., None, :, None],
            values[..., None, :, None],
            TokenHeadScales(
                key_rows[..., -SCALE_BYTES:].view(torch.float32),
                value_rows[..., -SCALE_BYTES:].view(torch.float32),
                (key_rows[..., None, :, None], value_rows[..., None, :, None]),
            ),
        )

    @classmethod
    def from_cpu_layout(cls, blocks: Tensor, layout: CpuLayout) -> "PagedKV":
        """Views of blocks as vLLM's CPU attention packs them.

        blocks: [L, num_blocks, H_kv, block_size, 2 * D], the last two dimensions contiguous.
        Per (block, head) the first ``block_size * D`` elements are keys, the rest values:

        - ``vec``, ``vec16``: keys [D, block_size], values [block_size, D];
        - ``amx``: keys [block_size/16, D/2, 16, 2] = (slot group, dim pair, slot, pair), values
          [D/16, block_size/2, 16, 2] = (dim group, slot pair, dim, pair).

        Source: vLLM csrc/cpu/cpu_attn_vec.hpp, cpu_attn_amx.hpp (``reshape_and_cache``).
        """
        _check_blocks(blocks)
        if layout not in get_args(CpuLayout):
            raise ArgumentError(
                f"CPU layout {layout!r} is unknown; known are {', '.join(get_args(CpuLayout))}"
            )
        block_size, head_dim = blocks.shape[3], blocks.shape[4] // 2
        if blocks.stride()[3:] != (2 * head_dim, 1):
            raise ArgumentError(
                f"blocks has strides {list(blocks.stride())}; the last two dimensions must be"
                f" contiguous, with strides [..., {2 * head_dim}, 1]"
            )
        keys, values = torch.unflatten(blocks.flatten(3), 3, (2, -1)).unbind(3)
        if layout != "amx":
            keys = torch.unflatten(keys, 3, (head_dim, block_size)).transpose(3, 4)
            values = torch.unflatten(values, 3, (block_size, head_dim))
            return cls(keys[..., None, :, None], values[..., None, :, None])
        if block_size % AMX_GROUP or head_dim % AMX_GROUP:
            raise ArgumentError(
                f"block size {block_size} and head dim {head_dim} must be multiples of"
                f" {AMX_GROUP} in the amx layout"
            )
        groups = (block_size // AMX_GROUP, head_dim // 2, AMX_GROUP, 2)
        keys = torch.unflatten(keys, 3, groups).permute(0, 1, 2, 3, 5, 4, 6)
        groups = (head_dim // AMX_GROUP, block_size // 2, AMX_GROUP, 2)
        values = torch.unflatten(values, 3, groups).permute(0, 1, 2, 4, 6, 3, 5)
        return cls(keys, values)

    @classmethod
    def from_rocm_layout(cls, blocks: Tensor, num_kv_heads: int) -> "PagedKV":
        """Views of blocks as vLLM's ROCm paged attention packs them.

        blocks: [L, num_blocks, 2, block_size, H_kv * D], the last two dimensions contiguous. Per
        block, index 0 holds all keys as [H_kv, D/x, block_size, x] with 16 bytes of head dims
        together (x elements), index 1 all values as [H_kv, D, block_size].

        Source: vLLM ``PagedAttention.split_kv_cache``.
        """
        group = ROCM_GROUP_BYTES // blocks.itemsize
        if (
            blocks.dim() != 5
            or blocks.shape[2] != 2
            or blocks.shape[4] % (num_kv_heads * group)
            or blocks.stride()[3:] != (blocks.shape[4], 1)
        ):
            raise ArgumentError(
                f"blocks has shape {list(blocks.shape)} and strides {list(blocks.stride())};"
                " [L, num_blocks, 2, block_size, H_kv * D] with the last two dimensions contiguous"
                f" and D a multiple of {group} is needed"
            )
        keys, values = blocks.flatten(3).unbind(2)
        head_dim, slots = blocks.shape[4] // num_kv_heads, blocks.shape[3]
        keys = torch.unflatten(keys, 2, (num_kv_heads, head_dim // group, slots, group))
        values = torch.unflatten(values, 2, (num_kv_heads, head_dim, slots))
        return cls(
            keys.permute(0, 1, 2, 4, 3, 5)[:, :, :, :, None],
            values.transpose(3, 4)[:, :, :, :, None, :, None],
        )


def _check_blocks(blocks: Tensor) -> None:
    if blocks.dim() != 5 or blocks.shape[4] % 2 or blocks.shape[4] == 0:
        raise ArgumentError(
            f"blocks has shape {list(blocks.shape)};"
            " [L, num_blocks, H_kv, block_size, 2 * D] is needed"
        )
