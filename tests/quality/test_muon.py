"""The optimizer of the matrices against torch's, and shared by several processes."""

from pathlib import Path

import muon_steps
import pytest
import torch
from fresh_script import answer_of
from muon_steps import RATES, SHAPES, begun, step_often
from quality.muon import Muon, orthogonal
from torch import Tensor


def stepped(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Matrices after some steps of ours ("ours") or of torch's."""
    matrices = [matrix.requires_grad_() for matrix in begun()]
    ours = kind == "ours"
    return step_often(
        Muon(matrices, **RATES, dtype=dtype) if ours else torch.optim.Muon(matrices, **RATES)
    )


def test_in_bfloat16_it_is_torchs() -> None:
    pairs = zip(stepped("ours", torch.bfloat16), stepped("torch", torch.bfloat16), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_in_float32_it_is_torchs_within_the_rounding_of_bfloat16() -> None:
    """An element is rounded by up to 2^-9 of itself, in five iterations of three products each."""
    ours, theirs = (stepped(kind, torch.float32) for kind in ("ours", "torch"))
    for one, other, start in zip(ours, theirs, begun(), strict=True):
        error = (one - other).norm() / (other - start).norm()
        assert 0 < error < 15 * 2**-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_processes_that_share_the_matrices_make_what_one_makes(dtype: str) -> None:
    alone = [matrix.tolist() for matrix in stepped("ours", getattr(torch, dtype))]
    assert answer_of(Path(muon_steps.__file__), "2", dtype, environment={}) == [alone, alone]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    values = torch.linalg.svdvals(orthogonal(matrix))
    # Where the iteration with these coefficients ends, whatever it began with above 0.01 or so.
    assert values.min() > 0.3
    assert values.max() < 1.3
