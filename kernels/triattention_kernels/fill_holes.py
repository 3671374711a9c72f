"""Order kept tokens so that those inside the destination range stay where they are."""

import torch
from torch import Tensor

from triattention_kernels import fill_holes_torch
from triattention_kernels.checks import check_batch, check_tensor
from triattention_kernels.implementation import Implementation, choose
from triattention_kernels.round_batch import RoundBatch


def fill_holes(
    kept: Tensor,
    batch: RoundBatch,
    block_size: int,
    implementation: Implementation | None = None,
) -> Tensor:
    """``order[j] = j`` where region token j is kept, else the next kept token past the range.

    The range is the first ``n = num_destination_blocks * block_size`` tokens of a region: as
    many places are free in it as kept tokens lie behind it. ``compact`` then moves the latter
    alone, and tokens of the range whose destination block is not their own. The physical order
    inside the destination blocks is no longer the order of time.

    kept: [R, L, H_kv, M_max * block_size] int64 as ``select`` returns it, ascending up to n.
    Returns the same shape, one memory where ``kept`` is; entries past n are 0. Does not
    synchronise with the device. Raises ArgumentError.
    """
    check_batch(batch, block_size, kept.device)
    num_kept = batch.destination_blocks.shape[1] * block_size
    shape = (batch.num_requests, None, None, num_kept)
    check_tensor("kept", kept, shape, (torch.int64,), kept.device)
    # What several layers (and heads) share, as expanded views, is ordered once.
    shared = tuple(
        slice(1) if dim in (1, 2) and stride == 0 else slice(None)
        for dim, stride in enumerate(kept.stride())
    )
    sets = kept[shared].contiguous()
    if choose(implementation, kept.device) == "triton":
        from triattention_kernels import fill_holes_triton

        order = fill_holes_triton.fill_holes(sets, batch, block_size)
    else:
        order = fill_holes_torch.fill_holes(sets, batch, block_size)
    return order.expand(kept.shape)
