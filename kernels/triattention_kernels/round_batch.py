"""Which tokens the three operations read and write: a batch of rounds."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from triattention_kernels.host_copy import on_device


@dataclass(frozen=True)
class RoundBatch:
    """One round for each of R requests, executed together.

    The *region* of a request is all tokens of its source blocks, in order. It starts at the
    block that holds the first candidate (or before), so protected tokens may lead it, and its end
    is block-aligned. A round keeps exactly ``num_destination_blocks * block_size`` tokens of it:
    the leading protected ones and K survivors.

    source_blocks: [R, S_max] int64, physical block ids in row order, rows padded with 0.
    destination_blocks: [R, M_max] int64, likewise; all distinct within the batch (not checked:
        that would synchronise with the device), and free to be source blocks as well.
    num_source_blocks, num_destination_blocks: blocks of each request, 1 <= M <= S.
    first_candidate: protected tokens at the start of each region, less than are kept of it.
    moves_forward: the caller's promise, from the block ids that it knows on the host, that
        destination block j of a request is its own source block j or a block that no request of
        the batch reads (``forward.moves_forward``). ``compact`` then needs no scratch memory.
    """

    source_blocks: Tensor
    destination_blocks: Tensor
    num_source_blocks: tuple[int, ...]
    num_destination_blocks: tuple[int, ...]
    first_candidate: tuple[int, ...]
    moves_forward: bool = False

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.num_source_blocks)

    @cached_property
    def counts(self) -> Tensor:
        """(source blocks, destination blocks, first candidate) of each request, [R, 3] int32 on
        the device of the block ids; copied there once, without waiting for it.
        """
        columns = (self.num_source_blocks, self.num_destination_blocks, self.first_candidate)
        rows = list(zip(*columns, strict=True))
        return on_device(rows, torch.int32, self.source_blocks.device)
