"""The specification of ``compact``, and its path where there is no GPU."""

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch

INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# From so many slots on, which lie side by side, their head dims are copied one by one.
SLOTS_TOGETHER = 16

# Dimensions of the keys or values of one layer.
BLOCK, HEAD, S1, S2, D1, D2 = range(6)


def compact(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """See ``triattention_kernels.compact.compact``."""
    for layers, part in kv.evenly_spaced():
        for view in part.rows:
            move(as_integers(view), batch, kept[:, layers])


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


def move(view: Tensor, batch: RoundBatch, kept: Tensor) -> None:
    """``compact`` for keys or values, layer by layer: everything of a layer is read before
    anything is written to it.
    """
    moves: list[WholeBlocks | SingleTokens] = []
    for layer, tokens in zip(view, kept.unbind(1), strict=True):
        if not moves or kept.stride(1) != 0:  # what all layers share is planned once
            moves = [moves_of(layer, batch, idx, own) for idx, own in enumerate(tokens)]
        contents = [own.read(layer) for own in moves]
        for own, content in zip(moves, contents, strict=True):
            own.write(layer, content)


def moves_of(
    layer: Tensor, batch: RoundBatch, request_idx: int, kept: Tensor
) -> "WholeBlocks | SingleTokens":
    """What moves for one request, kept [H_kv, M_max * block_size]: all that its destination blocks
    receive or, in its own blocks, the tokens that change place, if these are few.
    """
    num_destination = batch.num_destination_blocks[request_idx]
    source = batch.source_blocks[request_idx]
    destination = batch.destination_blocks[request_idx, :num_destination]
    tokens = kept[:, : num_destination * layer.shape[S1] * layer.shape[S2]]
    slots = offsets_along(layer, S1)[:, None] + offsets_along(layer, S2)
    region = ((source * layer.stride(BLOCK))[:, None, None] + slots).flatten()
    heads = offsets_along(layer, HEAD)[:, None]
    offsets = region[tokens] + heads
    if torch.equal(destination, source[:num_destination]):
        places = region[: tokens.shape[1]] + heads
        moved = offsets != places
        if 4 * int(moved.sum()) < moved.numel():
            return SingleTokens.of(layer, offsets[moved], places[moved])
    return WholeBlocks.of(layer, destination.tolist(), offsets)


def offsets_along(layer: Tensor, dim: int) -> Tensor:
    """Elements from index 0 of a dimension to every index of it."""
    return torch.arange(layer.shape[dim], device=layer.device) * layer.stride(dim)


def elements_of(layer: Tensor, planes: tuple[int, ...] = ()) -> Tensor:
    """``[*planes, i]`` is element i from the start of each plane, a view that overlaps itself."""
    others = [dim for dim in range(layer.dim()) if dim not in planes]
    num_elements = 1 + sum((layer.shape[dim] - 1) * layer.stride(dim) for dim in others)
    sizes = [layer.shape[dim] for dim in planes]
    steps = [layer.stride(dim) for dim in planes]
    return layer.as_strided((*sizes, num_elements), (*steps, 1))


@dataclass(frozen=True)
class SingleTokens:
    """source, destination: elements of a layer [n] that are read, and where each of them goes."""

    source: Tensor
    destination: Tensor

    @classmethod
    def of(cls, layer: Tensor, source: Tensor, destination: Tensor) -> "SingleTokens":
        """source, destination: offsets [n] of tokens, and of the places that they go to."""
        dims = offsets_along(layer, D1)[:, None] + offsets_along(layer, D2)
        return cls(*((own[:, None, None] + dims).flatten() for own in (source, destination)))

    def read(self, layer: Tensor) -> Tensor:
        """A copy of what moves."""
        return elements_of(layer).index_select(0, self.source)

    def write(self, layer: Tensor, content: Tensor) -> None:
        """What ``read`` returned goes to its places."""
        elements_of(layer).index_copy_(0, self.destination, content)


@dataclass(frozen=True)
class WholeBlocks:
    """Destination blocks, put together in the order in which they lie in memory: no token is
    unpacked.

    Head dims that lie further apart than the tokens of a block, or between slots of which many lie
    side by side, are *planes*, in each of which the tokens lie alike. All head dims of a token
    side by side are a *row*.

    destination: M block ids. planes: dimensions of a layer. index: elements of a plane that the
    blocks receive, or rows of ``row`` elements, [M, H_kv, *inner]; inner: the other dimensions of
    a block, in memory order.
    """

    destination: list[int]
    planes: tuple[int, ...]
    inner: tuple[int, ...]
    row: int
    index: Tensor

    @classmethod
    def of(cls, layer: Tensor, destination: list[int], offsets: Tensor) -> "WholeBlocks":
        """offsets: of the tokens [H_kv, M * block_size] that the blocks receive, in order."""
        in_block = [S1, S2, D1, D2]
        in_block.sort(key=lambda dim: (layer.shape[dim] == 1, -layer.stride()[dim]))
        num_wide = sum(layer.shape[dim] > 1 for dim in in_block)
        innermost = in_block[max(0, num_wide - 1)]
        size = layer.shape[innermost]
        planes = tuple(takewhile((D1, D2).__contains__, in_block))
        if innermost in (S1, S2) and size >= SLOTS_TOGETHER:
            planes = tuple(dim for dim in in_block if dim in (D1, D2))
        inner = tuple(dim for dim in in_block if dim not in planes)
        others = [layer.stride(dim) for dim in range(layer.dim()) if dim != innermost]
        in_rows = size == layer.shape[D1] * layer.shape[D2] and layer.stride(innermost) == 1
        in_rows &= innermost in (D1, D2) and all(stride % size == 0 for stride in others)
        row = size if in_rows and not planes else 1
        slots = (len(destination), layer.shape[S1], layer.shape[S2])
        blocks = torch.unflatten(offsets // row, 1, slots).transpose(0, 1)[..., None, None]
        index = blocks.permute(*planes, BLOCK, HEAD, *inner).contiguous()
        for dim in {D1, D2}.intersection(inner) if row == 1 else ():
            behind = [1] * (len(inner) - 1 - inner.index(dim))
            index = index + offsets_along(layer, dim).view(-1, *behind)
        return cls(destination, planes, inner, row, index)

    def read(self, layer: Tensor) -> Tensor:
        """A copy of what moves, [*planes, M, H_kv, *inner]."""
        elements = elements_of(layer, self.planes)
        if self.row > 1:
            rows = elements.view(-1, self.row).index_select(0, self.index.flatten())
            num_blocks, num_heads = self.index.shape[:2]
            return rows.view(num_blocks, num_heads, *(layer.shape[dim] for dim in self.inner))
        shape = (*elements.shape[:-1], self.index.numel())
        content = elements.gather(-1, self.index.flatten().expand(shape))
        return torch.unflatten(content, -1, self.index.shape[len(self.planes) :])

    def write(self, layer: Tensor, content: Tensor) -> None:
        """What ``read`` returned becomes the content of the blocks."""
        blocks = layer.permute(BLOCK, *self.planes, HEAD, *self.inner)
        for idx, block in enumerate(self.destination):
            blocks[block].copy_(content.select(len(self.planes), idx))
