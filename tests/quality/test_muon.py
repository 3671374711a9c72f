"""The optimizer of the matrices against torch's."""

import pytest
import torch
from quality.muon import Muon, orthogonal
from torch import Tensor

SHAPES = ((64, 64), (32, 64), (128, 64))
STEPS = 3


def begun() -> list[Tensor]:
    """The matrices before any step."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Matrices after some steps of ours ("ours") or of torch's."""
    generator = torch.Generator().manual_seed(6)
    matrices = [matrix.requires_grad_() for matrix in begun()]
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
    """An element is rounded by up to 2^-9 of itself, in five iterations of three products each."""
    ours, theirs = (stepped(kind, torch.float32) for kind in ("ours", "torch"))
    for one, other, start in zip(ours, theirs, begun(), strict=True):
        error = (one - other).norm() / (other - start).norm()
        assert 0 < error < 15 * 2**-9


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    values = torch.linalg.svdvals(orthogonal(matrix))
    # Where the iteration with these coefficients ends, whatever it began with above 0.01 or so.
    assert values.min() > 0.3
    assert values.max() < 1.3
