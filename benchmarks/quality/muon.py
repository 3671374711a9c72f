"""Muon for the matrices of the small reasoner, in arithmetic that the processor has.

torch.optim.Muon orthogonalises in bfloat16, whatever the parameters are. A processor that emulates
bfloat16 spends nearly all of a training step there; in float32 it is a thirtieth of that. Processes
that train together take turns with the matrices instead of doing each of them everywhere.
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
        self,
        matrices: list[Tensor],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        num_ranks: int = 1,
    ) -> None:
        """matrices: parameters of two dimensions; dtype: of the orthogonalisation; num_ranks:
        processes of torch.distributed's default group, which must have the same gradients."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        self.num_ranks = num_ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            matrices: list[Tensor] = group["params"]
            averages = [self._nesterov(matrix) for matrix in matrices]
            for matrix, update in zip(matrices, self._orthogonal(averages), strict=True):
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _nesterov(self, matrix: Tensor) -> Tensor:
        """The matrix' average gradient, one step ahead."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(average, MOMENTUM)

    def _orthogonal(self, averages: list[Tensor]) -> list[Tensor]:
        """Every one made orthogonal, each by one rank."""
        if self.num_ranks == 1:
            return [orthogonal(average.to(self.dtype)) for average in averages]
        rank = torch.distributed.get_rank()
        sizes = [average.numel() for average in averages]
        flat = averages[0].new_zeros(sum(sizes), dtype=self.dtype)
        parts = zip(flat.split(sizes), averages, strict=True)
        updates = [part.view_as(average) for part, average in parts]
        for idx in range(rank, len(averages), self.num_ranks):
            updates[idx].copy_(orthogonal(averages[idx].to(self.dtype)))
        torch.distributed.all_reduce(flat)
        return updates


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
