"""Layers that lie anywhere in memory, in any order: the same round as where they lie evenly."""

import pytest
import torch
from scattered_blocks import scattered_round
from score_oracle import random_weights
from torch import Tensor
from triattention_kernels import RoundBatch
from triton_runs import run_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8)


def make_content(dtype: torch.dtype) -> Tensor:
    """Blocks [L, num_blocks, H_kv, block_size, content] of one cache."""
    generator = torch.Generator().manual_seed(2)
    size = (3, 6, 2, 16, 2 * 32)
    if dtype != torch.int8:
        return torch.randn(size, generator=generator).to(dtype)
    numbers = torch.randint(-128, 128, size, generator=generator).to(dtype)
    scales = torch.rand((*size[:4], 2), generator=generator).view(torch.int8).unflatten(-1, (2, 4))
    return torch.cat([numbers.unflatten(-1, (2, 32)), scales], dim=-1).flatten(4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moves_forward", [True, False])
def test_a_round_of_scattered_layers_is_that_of_even_ones(dtype, moves_forward, make_batch):
    content = make_content(dtype)
    destinations = [[4, 5], [2]] if moves_forward else [[1, 4], [3]]
    plain = make_batch([[4, 1, 3], [2]], destinations, [5, 0])
    batch = RoundBatch(**(vars(plain) | {"moves_forward": moves_forward}))
    weights = random_weights((2, 3, 8, 32), 32)
    kept = torch.arange(32).expand(2, 3, 2, 32) * 3 // 2
    kept = torch.where(torch.arange(2)[:, None, None, None] == 0, kept, torch.arange(32))
    even = scattered_round(content, None, batch, weights, kept, "torch")
    # Backwards, in two storages, a multiple of 16, of 8 and of 4 bytes apart.
    for gap, implementation in ((16, "torch"), (16, "triton"), (8, "triton"), (4, "triton")):
        arguments = (content, gap, batch, weights, kept, implementation)
        (scores, chosen, moved), _ = run_triton("scattered_blocks:scattered_round", *arguments)
        torch.testing.assert_close(scores, even[0], rtol=1e-5, atol=1e-4)
        assert torch.equal(chosen, even[1])
        assert torch.equal(moved.view(torch.uint8), even[2].view(torch.uint8))
