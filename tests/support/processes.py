"""Processes of other processes, seen from outside."""

import time
from collections.abc import Iterable

import psutil


def runs(process: psutil.Process) -> bool:
    """Neither gone nor ended and waiting to be asked for its status."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def left_after(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run when none does, or after so long."""
    left, deadline = list(filter(runs, processes)), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = list(filter(runs, left))
    return left
