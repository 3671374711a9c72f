"""A round of two requests over a small random cache, for tests that go token by token."""

import torch
from triattention_kernels import PagedKV, RoundBatch

NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 2, 2, 4, 8
TWO_REQUESTS = RoundBatch(
    source_blocks=torch.tensor([[3, 1, 7], [5, 2, 0]]),
    destination_blocks=torch.tensor([[3, 1], [5, 0]]),
    num_source_blocks=(3, 2),
    num_destination_blocks=(2, 1),
    first_candidate=(1, 0),
)


def small_cache(seed: int = 0) -> PagedKV:
    shape = (NUM_LAYERS, 9, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
    return PagedKV.from_blocks(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
