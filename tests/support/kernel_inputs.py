"""What tests of kernels are given: layouts, padded rows and keep sets; and tensors as bits."""

import torch
from torch import Tensor
from triattention_kernels import RoundBatch

LAYOUTS = ("head_major", "token_major", "vec", "amx")


def padded(rows: list[list[int]]) -> Tensor:
    """Rows of block ids, the shorter ones with 0 behind them."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def random_kept(batch: RoundBatch, num_layers: int, num_kv_heads: int, block_size: int) -> Tensor:
    """Ascending random region tokens per request, layer and head; poison past the end."""
    generator = torch.Generator().manual_seed(5)
    num_requests, num_destination = batch.destination_blocks.shape
    kept = torch.full(
        (num_requests, num_layers, num_kv_heads, num_destination * block_size), 1 << 40
    )
    for r in range(num_requests):
        num_kept = batch.num_destination_blocks[r] * block_size
        for row in kept[r].flatten(0, 1):
            order = torch.randperm(batch.num_source_blocks[r] * block_size, generator=generator)
            row[:num_kept] = order[:num_kept].sort().values
    return kept


def bits(tensor: Tensor) -> Tensor:
    """Equal where every bit is, also of NaN."""
    of_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(of_size[tensor.itemsize])
