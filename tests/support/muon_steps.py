"""Steps of Muon on random matrices, by so many processes together: the matrices of each process."""

import json
import sys
import tempfile

import torch
from quality.muon import Muon

SHAPES = ((64, 64), (32, 64), (128, 64))
STEPS = 3
RATES = {"lr": 0.02, "weight_decay": 0.01}


def begun() -> list[torch.Tensor]:
    """The matrices before any step."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def step_often(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's matrices after some steps with random gradients."""
    generator = torch.Generator().manual_seed(6)
    matrices: list[torch.Tensor] = optimizer.param_groups[0]["params"]
    for _ in range(STEPS):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def _step(rank: int, num_ranks: int, dtype: str, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=num_ranks
    )
    matrices = [matrix.requires_grad_() for matrix in begun()]
    optimizer = Muon(matrices, **RATES, dtype=getattr(torch, dtype), num_ranks=num_ranks)
    torch.save(step_often(optimizer), f"{folder}/{rank}")


if __name__ == "__main__":
    num_ranks, dtype = int(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_step, (num_ranks, dtype, folder), num_ranks)
        found = [torch.load(f"{folder}/{rank}") for rank in range(num_ranks)]
    print(json.dumps([[matrix.tolist() for matrix in matrices] for matrices in found]))
