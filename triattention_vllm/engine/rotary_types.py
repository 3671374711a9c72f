"""What is read about one layer's rotary embedding, and the check that it is what the layer uses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from triattention_vllm.errors import SeamError


@dataclass(frozen=True)
class LayerRotary:
    """inv_freq: float64 [F]; attention_factor multiplies cos and sin; rotary_dim is 2F."""

    inv_freq: Tensor
    attention_factor: float
    rotary_dim: int
    interleaved: bool

    @classmethod
    def none(cls) -> "LayerRotary":
        """A NoPE layer."""
        return cls(torch.zeros(0, dtype=torch.float64), 1.0, 0, False)


def sampled_positions(num_positions: int) -> Tensor:
    """0, powers of two with their neighbours, and the last position: int64, ascending."""
    powers = [1 << exponent for exponent in range(num_positions.bit_length())]
    sampled = {0, num_positions - 1, *(p + shift for p in powers for shift in (-1, 0, 1))}
    return torch.tensor(sorted(p for p in sampled if 0 <= p < num_positions))


def check_against_tables(
    name: str, inv_freq: Tensor, attention_factor: float, table: Tensor
) -> None:
    """Compare ``m cos(p w_f), m sin(p w_f)`` with a module's table [P, 2F], cosines first.

    The allowed difference is the table's own resolution: ``m`` times the rounding of its dtype,
    plus the rounding of the float32 angle ``p w_f`` from which every module computes it: on a GPU
    4 units in the last place of the power (CUDA's bound for powf), a half of its reciprocal and of
    the product, and what the cosine adds.
    Raises SeamError naming the worst frequency.
    """
    if table.ndim != 2 or table.shape[1] != 2 * inv_freq.numel() or not table.shape[0]:
        raise SeamError(
            f"{name} has a table of shape {list(table.shape)} for {inv_freq.numel()} frequencies; "
            "cosines and sines of each were expected. This vLLM version is not supported"
        )
    positions = sampled_positions(table.shape[0])
    frequencies = inv_freq.to("cpu", torch.float64)
    angles = positions.to(torch.float64)[:, None] * frequencies
    expected = attention_factor * torch.cat((angles.cos(), angles.sin()), dim=-1)
    found = table[positions.to(table.device)].to("cpu", torch.float64)
    rounding = torch.finfo(table.dtype).eps + 6 * torch.finfo(torch.float32).eps * (1 + angles)
    excess = (found - expected).abs() - attention_factor * torch.cat((rounding, rounding), dim=-1)
    worst = int(excess.nan_to_num(nan=torch.inf).max(dim=0).values.argmax())
    if not bool((excess <= 0).all()):
        frequency_idx = worst % frequencies.numel()
        difference = float((found - expected)[:, worst].abs().max())
        raise SeamError(
            f"{name} does not rotate with the frequencies computed from its parameters: frequency "
            f"{frequency_idx} is {float(frequencies[frequency_idx]):.6g} radians per position, "
            f"and its cos/sin table differs by {difference:.3g}. The module was patched, or this "
            "vLLM version computes it otherwise; serve without KV compression and report the model"
        )
