"""Small numbers of the host on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(
    numbers: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor [n], or [rows, columns] of rows of equal length; one copy that nothing waits for."""
    on_host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
