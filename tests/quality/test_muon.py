"""The optimizer of the matrices against torch's."""

import pytest
import torch
from quality.muon import Muon, orthogonal
from torch import Tensor

SHAPES = ((64, 64), (32, 64), (128, 64))
STEPS = 3


def stepped(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Matrices after some steps of ours ("ours") or of torch's."""
    generator = torch.Generator().manual_seed(5)
    matrices = [torch.randn(shape, generator=generator, requires_grad=True) for shape in SHAPES]
    rates = {"lr": 0.02, "weight_decay": 0.01}
    optimizer: torch.optim.Optimizer = (
        Muon(matrices, **rates, dtype=dtype)
        if kind == "ours"
        else torch.optim.Muon(matrices, **rates)
    )
    for _ in range(STEPS):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_in_bfloat16_it_is_torchs() -> None:
    pairs = zip(stepped("ours", torch.bfloat16), stepped("torch", torch.bfloat16), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_in_float32_it_is_torchs_within_the_rounding_of_bfloat16() -> None:
    pairs = zip(stepped("ours", torch.float32), stepped("torch", torch.bfloat16), strict=True)
    for ours, theirs in pairs:
        # A step changes an element by about a rate over the root of the shorter side.
        assert 0 < (ours - theirs).abs().max() < 0.1 * STEPS * 0.02 * 2**0.5
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.9999


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    values = torch.linalg.svdvals(orthogonal(matrix))
    # Where the iteration with these coefficients ends, whatever it began with above 0.01 or so.
    assert values.min() > 0.3
    assert values.max() < 1.3
