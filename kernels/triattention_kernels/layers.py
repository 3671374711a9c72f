"""Where the layers of a cache lie in memory."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from triattention_kernels.errors import ArgumentError


def stack_layers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L tensors in order as strided views [L_i, ...] of those in a row that lie in one storage, at
    equal spacing and ascending; a single view where all of them do.

    Nothing is copied. Raises ArgumentError where the tensors differ in shape, strides, dtype or
    device.
    """
    if not tensors:
        raise ArgumentError("no tensors to stack; give at least one layer")
    first = tensors[0]
    for idx, tensor in enumerate(tensors):
        found = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        expected = (first.shape, first.stride(), first.dtype, first.device)
        if found != expected:
            raise ArgumentError(
                f"layer {idx} has (shape, strides, dtype, device) {found}, layer 0 {expected};"
                " stack only layers that are alike"
            )
    stacks = []
    start = 0
    for end in range(1, len(tensors) + 1):
        if end == len(tensors) or _spacing(tensors[start : end + 1]) is None:
            together = tensors[start:end]
            # Nothing steps over a single layer; its first stride is aligned like all of it.
            strides = (_spacing(together) or first.stride(0), *first.stride())
            stacks.append(together[0].as_strided((len(together), *first.shape), strides))
            start = end
    return stacks


def byte_starts(views: Sequence[Tensor]) -> list[int]:
    """Bytes from the first layer of the first view to every layer of all of them."""
    return [
        view.data_ptr() - views[0].data_ptr() + idx * view.stride(0) * view.itemsize
        for view in views
        for idx in range(view.shape[0])
    ]


def _spacing(tensors: Sequence[Tensor]) -> int | None:
    """Elements between neighbours, if these lie ascending and equally spaced in one storage."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    offsets = [tensor.storage_offset() for tensor in tensors]
    steps = {later - earlier for earlier, later in itertools.pairwise(offsets)}
    if len(storages) > 1 or len(steps) != 1 or min(steps) < 1:
        return None
    return int(steps.pop())
