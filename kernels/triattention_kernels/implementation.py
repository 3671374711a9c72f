"""Which implementation of an operation runs."""

import os
from typing import Literal, get_args

import torch

from triattention_kernels.errors import ArgumentError

Implementation = Literal["torch", "triton"]


def choose(implementation: Implementation | None, device: torch.device) -> Implementation:
    """The implementation that was asked for, else the device's own: torch on the CPU, Triton on
    CUDA and ROCm, and on tensors without memory ("meta"), whose launches can be looked at.

    An explicit choice is kept or refused, never replaced. Triton runs tensors of the CPU under
    its interpreter only (environment TRITON_INTERPRET=1). Raises ArgumentError.
    """
    if implementation is None:
        return "torch" if device.type == "cpu" else "triton"
    if implementation not in get_args(Implementation):
        raise ArgumentError(
            f"implementation {implementation!r} is unknown; known are"
            f" {', '.join(get_args(Implementation))}"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if implementation == "triton" and device.type == "cpu" and not interpreted:
        raise ArgumentError(
            f'implementation="triton" was asked for tensors on {device}; Triton kernels run on'
            ' CUDA and ROCm devices: move the tensors there, or choose implementation="torch"'
        )
    return implementation
