"""Times of device work, taken in turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import median

import torch
from reporting import Json, spread

# While the device spins, the host queues the launches that are timed. Clocks are below 2.5 GHz, and
# a spin is half as long again as the queueing took before.
CYCLES_PER_SECOND = 2.5e9
SPIN_MARGIN = 1.5
LEAST_SPIN_S = 2e-4
MOST_SPIN_S = 0.05


@dataclass
class Times:
    """Seconds of one side. ``device``: between two events with the launches queued up before;
    ``wall``: from the call until its work is done, on an idle device.
    """

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def summary(self) -> Json:
        """Microseconds."""
        return {"device_us": spread_us(self.device), "wall_us": spread_us(self.wall)}


def spread_us(seconds: Sequence[float]) -> Json:
    """In microseconds, and of how many."""
    return {**spread([1e6 * value for value in seconds]), "count": len(seconds)}


def wall_seconds(call: Callable[[], object], device: str) -> float:
    """From the call until the device is idle again."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def queueing_seconds(call: Callable[[], object], device: str) -> float:
    """Until the call returns, its work on the device perhaps still to be done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    synchronize(device)
    return seconds


def device_seconds(call: Callable[[], object], device: str, queueing_s: float = 0.0) -> float:
    """Between two CUDA events; the same as ``wall_seconds`` on the CPU.

    queueing_s: what ``queueing_seconds`` found. A call that waits for the device is timed with the
    waiting, and launches that take longer to queue than MOST_SPIN_S with the gaps between them.
    """
    if device == "cpu":
        return wall_seconds(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spin_s = min(max(SPIN_MARGIN * queueing_s, LEAST_SPIN_S), MOST_SPIN_S)
    torch.cuda._sleep(int(spin_s * CYCLES_PER_SECOND))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device != "cpu":
        torch.cuda.synchronize()


def in_turns(
    sides: Mapping[str, Callable[[int], object]], num_turns: int, limit_s: float, device: str
) -> dict[str, Times]:
    """Call every side ``num_turns`` times for each of its two times, one side after the other. Each
    call has a number of its own, so that no call finds in the cache what the one before it read.

    First calls of each warm up and are not counted. A side that would need more than ``limit_s``
    seconds for all turns takes fewer, spread over the whole; at least one. One whose first call
    needs more than that is not warmed up again.
    """
    calls = count()
    own_turns, queueing = {}, {}
    for name, side in sides.items():
        seconds = queueing[name] = wall_seconds(partial(side, next(calls)), device)
        if seconds <= limit_s:
            queueing[name] = queueing_seconds(partial(side, next(calls)), device)
            seconds = wall_seconds(partial(side, next(calls)), device)
        own_turns[name] = max(1, min(num_turns, int(limit_s / (2 * max(seconds, 1e-9)))))
    times = {name: Times() for name in sides}
    for turn in range(num_turns):
        in_order = list(sides) if turn % 2 == 0 else [*sides][::-1]
        for name in in_order:
            own = own_turns[name]
            if (turn + 1) * own // num_turns == turn * own // num_turns:
                continue
            first, second = (partial(sides[name], next(calls)) for _ in range(2))
            times[name].device.append(device_seconds(first, device, queueing[name]))
            times[name].wall.append(wall_seconds(second, device))
    return times


def copy_bandwidth(num_bytes: int, device: str) -> float:
    """Bytes per second that a device-to-device copy reads and writes, median."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [device_seconds(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * num_bytes / median(seconds)
