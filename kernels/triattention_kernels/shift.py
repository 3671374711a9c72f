"""Shift rows of block ids left past their null head."""

import torch
from torch import Tensor

from triattention_kernels import shift_torch
from triattention_kernels.checks import check_tensor
from triattention_kernels.errors import ArgumentError
from triattention_kernels.implementation import Implementation, choose


def shift_rows(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_seq_lens: Tensor,
    null_below: int = 1,
    max_seq_len: int | None = None,
    implementation: Implementation | None = None,
) -> None:
    """``out[r, j] = row[r, j + e_r]``, ``out_seq_lens[r] = seq_lens[r] - e_r * block_size``.

    e_r counts the leading entries of row r below ``null_below``, at most
    ``(seq_lens[r] - 1) // block_size``: dummy and padded rows are all null, and entries behind
    a row's last block are stale. Where a block of the cache manager is split into k blocks of
    the kernel, its null entries are 0 to k - 1: ``null_below=k``.

    block_table: [R, W] int32, rows contiguous. seq_lens: [R] int32. Unchanged.
    out_table: [>= R, >= W] int32 and out_seq_lens: [>= R] int32, other memory; the first
        ``ceil(out_seq_lens[r] / block_size)`` entries of row r are written, nothing else.
    max_seq_len: an upper bound of seq_lens that the host knows; bounds the columns looked at.

    Does not synchronise with the device, allocates nothing on a GPU and branches on no data, so
    it can be captured in a graph. Raises ArgumentError.
    """
    num_rows, num_columns = _check(block_table, seq_lens, block_size, out_table, out_seq_lens)
    if max_seq_len is not None:
        num_columns = min(num_columns, -(-max_seq_len // block_size))
    rows = block_table[:, :num_columns]
    arguments = (rows, seq_lens, block_size, out_table[:num_rows, :num_columns])
    out_seq_lens = out_seq_lens[:num_rows]
    if choose(implementation, block_table.device) == "triton":
        from triattention_kernels import shift_triton

        shift_triton.shift_rows(*arguments, out_seq_lens, null_below)
    else:
        shift_torch.shift_rows(*arguments, out_seq_lens, null_below)


def _check(
    block_table: Tensor, seq_lens: Tensor, block_size: int, out_table: Tensor, out_seq_lens: Tensor
) -> tuple[int, int]:
    device, int32 = block_table.device, (torch.int32,)
    check_tensor("block_table", block_table, (None, None), int32, device)
    num_rows, num_columns = block_table.shape
    check_tensor("seq_lens", seq_lens, (num_rows,), int32, device)
    check_tensor("out_table", out_table, (None, None), int32, device)
    check_tensor("out_seq_lens", out_seq_lens, (None,), int32, device)
    if block_size < 1:
        raise ArgumentError(f"block_size is {block_size}; at least 1 is needed")
    found = (*out_table.shape, *out_seq_lens.shape)
    if any(
        size < needed for size, needed in zip(found, (num_rows, num_columns, num_rows), strict=True)
    ):
        raise ArgumentError(
            f"out_table has shape {list(out_table.shape)} and out_seq_lens"
            f" {list(out_seq_lens.shape)}; at least [{num_rows}, {num_columns}] and [{num_rows}]"
            " are needed"
        )
    for name, table in (("block_table", block_table), ("out_table", out_table)):
        if num_columns > 1 and table.stride(1) != 1:
            raise ArgumentError(
                f"{name} has strides {list(table.stride())}; rows must be contiguous"
            )
    return num_rows, num_columns
