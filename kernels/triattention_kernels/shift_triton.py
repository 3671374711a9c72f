"""``shift_rows`` on a GPU: one launch, one program per row."""

# Kernels are typed by Triton, from their launches.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit(do_not_specialize=["num_columns"])
def shift_kernel(
    block_table,
    seq_lens,
    out_table,
    out_seq_lens,
    num_columns,
    table_stride,
    out_stride,
    block_size,
    null_below,
    TILE: tl.constexpr,
):
    """Find the first entry that is no null, then copy what the shortened length needs."""
    row = tl.program_id(0).to(tl.int64)
    block_table += row * table_stride
    out_table += row * out_stride
    seq_len = tl.load(seq_lens + row)
    lanes = tl.arange(0, TILE)
    num_null = tl.minimum(tl.maximum(seq_len - 1, 0) // block_size, num_columns)
    for start in range(0, num_null, TILE):
        # num_null only falls: tiles behind the first hit find nothing lower.
        columns = start + lanes
        entry = tl.load(block_table + columns, mask=columns < num_null, other=0)
        found = (columns < num_null) & (entry >= null_below)
        num_null = tl.minimum(num_null, tl.min(tl.where(found, columns, num_null)))
    seq_len -= num_null * block_size
    num_needed = tl.minimum(tl.cdiv(seq_len, block_size), num_columns - num_null)
    for start in range(0, num_needed, TILE):
        columns = start + lanes
        entry = tl.load(block_table + num_null + columns, mask=columns < num_needed)
        tl.store(out_table + columns, entry, mask=columns < num_needed)
    tl.store(out_seq_lens + row, seq_len)


def shift_rows(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_seq_lens: Tensor,
    null_below: int,
) -> None:
    """See ``triattention_kernels.shift.shift_rows``. Moves ``traffic.shift_traffic`` bytes."""
    num_rows, num_columns = block_table.shape
    if num_rows == 0:
        return
    shift_kernel[(num_rows,)](
        block_table,
        seq_lens,
        out_table,
        out_seq_lens,
        num_columns,
        block_table.stride(0),
        out_table.stride(0),
        block_size,
        null_below,
        TILE=TILE,
        num_warps=4,
    )
