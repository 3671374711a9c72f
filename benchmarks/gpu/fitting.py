"""Which shapes of the kernel benchmark fit in a device's memory and in the time that is left."""

from collections.abc import Mapping
from math import log

import torch
from gpu.rounds import key_bytes
from triattention_kernels.traffic import RoundShape


def num_request_sets(shape: RoundShape, device: str) -> int:
    """So many that four times the L2 cache is read between two visits of a set by calls that take
    one set after the other.
    """
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(32, 1 + 4 * cache // key_bytes(shape))


def all_keys_bytes(shape: RoundShape, device: str) -> int:
    """Of all request sets."""
    return key_bytes(shape) * num_request_sets(shape, device)


def no_memory(shape: RoundShape, device: str) -> str | None:
    """Why a shape does not fit in the device's memory, or None: all sets with their values, and
    half as much for scores and the copies of the plain alternative.
    """
    if device == "cpu":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    needed = 3 * all_keys_bytes(shape, device)
    if needed <= 0.9 * total:
        return None
    return f"needs about {needed / 2**30:.0f} GiB, the device has {total / 2**30:.0f}"


def predicted_seconds(measured: Mapping[int, float], num_bytes: int) -> float:
    """What a shape with so many bytes of keys in all its sets may take: as long as the measured one
    that is nearest in size, and longer in proportion where it is larger. 0 where none is measured.
    """
    if not measured:
        return 0.0
    nearest = min(measured, key=lambda known: abs(log(num_bytes / known)))
    return measured[nearest] * max(1.0, num_bytes / nearest)


def no_time(
    shape: RoundShape, device: str, measured: Mapping[int, float], left: float
) -> str | None:
    """Why a shape is not begun with so many seconds ``left``, or None. measured: seconds of shapes
    by the bytes of their keys.
    """
    needed = predicted_seconds(measured, all_keys_bytes(shape, device))
    if 0 <= left >= needed:
        return None
    return f"{max(left, 0):.0f} s are left, it may need {needed:.0f}; give more with --seconds"
