"""How long a sum on tensor cores may be, by a model of them.

NVIDIA's multiply exactly and add with what does not fit in float32 cut off. Triton splits float32
operands in two TF32 numbers each ("tf32x3"), begins every product of tiles at zero, and adds its
result to the total outside.
"""

import pytest
import torch
from torch import Tensor
from triattention_kernels import score_triton

DEPTH = 8  # products that one instruction adds at once
ERROR_MARGIN = 1.25  # as in test_score_triton


def as_tf32(values: Tensor) -> Tensor:
    """Rounded to eleven significant bits, ties away from zero."""
    bits = values.view(torch.int32).long() + 0x1000
    return (bits & ~0x1FFF).int().view(torch.float32)


def cut_off(values: Tensor) -> Tensor:
    """float64 to float32, towards zero."""
    nearest = values.float()
    too_far = nearest.double().abs() > values.abs()
    return torch.where(too_far, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


def on_tensor_cores(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of one tile."""
    large, other = as_tf32(left), as_tf32(right)
    small, rest = as_tf32(left - large), as_tf32(right - other)
    total = torch.zeros(left.shape[0], right.shape[1])
    for first, second in ((small, other), (large, rest), (large, other)):
        for k in range(0, left.shape[1], DEPTH):
            terms = first[:, k : k + DEPTH].double() @ second[k : k + DEPTH].double()
            total = cut_off(total.double() + terms)
    return total


def score_error(num_pairs: int, num_terms: int, dtype: torch.dtype) -> float:
    """Of scores in sums of ``num_terms``, root mean square, over that of torch in float32."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2048, num_pairs, generator=generator).to(dtype).float() for _ in range(2))
    weights = torch.randn(3, num_pairs, 8, generator=generator)
    parts = list(zip((x, y, torch.sqrt(x * x + y * y)), weights, strict=True))
    exact = torch.sqrt(x.double() ** 2 + y.double() ** 2)
    truth = sum(a.double() @ b.double() for a, b in ((x, weights[0]), (y, weights[1])))
    truth = truth + exact @ weights[2].double()
    plain, found = torch.zeros(2048, 8), torch.zeros(2048, 8)
    for left, right in parts:
        plain = plain + left @ right
    for k in range(0, num_pairs, num_terms):
        for left, right in parts:
            tile = slice(k, k + num_terms)
            found = found + on_tensor_cores(left[:, tile].contiguous(), right[tile].contiguous())
    errors = [(scores.double() - truth).square().mean().sqrt() for scores in (found, plain)]
    rounding = truth.square().mean().sqrt() * torch.finfo(torch.float32).eps
    return float(errors[0] / max(errors[1], rounding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_pairs", [32, 64, 128])
def test_sums_as_long_as_the_kernels_err_no_more_than_float32(
    num_pairs: int, dtype: torch.dtype
) -> None:
    num_terms = score_triton.score_constants(4, 2 * num_pairs, 2 * num_pairs)["PAIRS_TILE"]
    assert isinstance(num_terms, int)
    assert score_error(num_pairs, num_terms, dtype) <= ERROR_MARGIN


def test_longer_sums_err_more() -> None:
    assert score_error(64, 64, torch.bfloat16) > ERROR_MARGIN
