"""The specification of ``shift_rows``, and its path where there is no GPU."""

import torch
from torch import Tensor


def shift_rows(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_seq_lens: Tensor,
    null_below: int,
) -> None:
    """See ``triattention_kernels.shift.shift_rows``; the outputs have the rows' shape."""
    num_columns = block_table.shape[1]
    num_null = (block_table < null_below).cumprod(dim=1).sum(dim=1)
    num_null = torch.minimum(num_null, (seq_lens - 1).clamp(min=0) // block_size)
    shortened = seq_lens - num_null * block_size
    columns = torch.arange(num_columns, device=block_table.device)
    needed = columns < ((shortened + block_size - 1) // block_size)[:, None]
    sources = (columns + num_null[:, None]).clamp(max=max(num_columns - 1, 0))
    out_table.copy_(torch.where(needed, block_table.gather(1, sources), out_table))
    out_seq_lens.copy_(shortened)
