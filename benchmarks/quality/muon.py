"""Muon for the matrices of the small reasoner, in arithmetic that the processor has.

torch.optim.Muon orthogonalises in bfloat16, whatever the parameters are. A processor that emulates
bfloat16 spends nearly all of a training step there; in float32 it is a thirtieth of that.
"""

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov's, made orthogonal: K. Jordan, https://kellerjordan.github.io/posts/muon/.

    In bfloat16 the same to the bit as torch.optim.Muon with its defaults.
    """

    def __init__(
        self, matrices: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        """matrices: parameters of two dimensions; dtype: of the orthogonalisation."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                update = matrix.grad.lerp(average, MOMENTUM)
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                matrix.add_(orthogonal(update.to(self.dtype)), alpha=-rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by Newton and Schulz's iteration of fifth
    order, in the dtype of ``matrix``."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    first, third, fifth = COEFFICIENTS
    matrix = matrix / matrix.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        square = matrix @ matrix.T
        factor = torch.addmm(square, square, square, beta=third, alpha=fifth)
        matrix = torch.addmm(matrix, factor, matrix, beta=first)
    return matrix
