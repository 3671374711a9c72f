"""Scores of a published model's statistics, as published code computes them.

The float64 column of the file uses frequencies computed in float64, the float32 column those
that a model stores in float32.

The file is not part of the repository: it lies in ``shared/data/golden`` beside it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from triattention_kernels import PagedKV, score

GOLDEN = Path(__file__).parents[2].parent / "shared/data/golden/score_qwen3_8b.safetensors"
NEXT_QUERY_POSITION = 5000
OFFSETS = [1 << exponent for exponent in range(17)]


def mean_turn(frequencies: Tensor) -> Tensor:
    """[1, L, F] complex128: the mean over future positions."""
    positions = NEXT_QUERY_POSITION + torch.tensor(OFFSETS, dtype=torch.float64)
    phases = positions[:, None] * frequencies
    return torch.polar(torch.ones_like(phases), phases).mean(dim=0).expand(1, 2, -1)


@pytest.mark.skipif(not GOLDEN.exists(), reason="shared/data/golden is not beside the repository")
def test_scores_equal_the_published_ones(make_batch):
    golden = load_file(GOLDEN)
    keys = golden["keys_rotated"]  # [L, H_kv, T, D]
    blocks = torch.cat((keys, keys), dim=-1).unflatten(2, (6, 16)).transpose(1, 2)
    kv = PagedKV.from_blocks(blocks)
    centre = torch.complex(golden["q_mean_real"].double(), golden["q_mean_imag"].double())
    centres = torch.cat((centre.real, centre.imag), dim=-1)
    norms = golden["q_abs_mean"].double() - centre.abs()
    batch = make_batch([[0, 1, 2, 3, 4, 5]], [[0]], [0])

    exact_frequencies = 1e6 ** (-torch.arange(64, dtype=torch.float64) / 64)
    exact = score(kv, batch, centres, norms, mean_turn(exact_frequencies), False, 128)[0]
    expected = golden["scores_fp64"]
    scale = expected.abs().amax(dim=-1, keepdim=True)
    assert ((exact - expected).abs() <= 1e-6 * scale).all()

    turns = mean_turn(golden["inv_freq"].double()).to(torch.complex64)
    single = score(kv, batch, centres.float(), norms.float(), turns, False, 128)[0]
    expected = golden["scores_per_query_head"]
    assert ((single - expected).abs() <= 1e-4 * scale).all()
