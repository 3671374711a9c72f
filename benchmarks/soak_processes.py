"""Memory, file descriptors and threads of every process of a server, and whether they grow."""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import psutil
from soak_memory import path_of

_NUM_PARTS = 10


@dataclass
class Samples:
    """One process: seconds since the start, and each quantity at that time."""

    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class ProcessSampler:
    """Samples the process ``pid`` and all that descend from it; what they say of themselves is in
    ``folder`` (``soak_memory``)."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.root = psutil.Process(pid)
        self.folder = folder
        self.start = time.monotonic()
        self.samples: dict[str, Samples] = defaultdict(Samples)

    async def run(self, seconds_between: float) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(seconds_between)

    def sample(self) -> None:
        """One sample of every process."""
        now = time.monotonic() - self.start
        for process in (self.root, *self.root.children(recursive=True)):
            # A process is named by its id and what it calls itself, without folders.
            words = [Path(word).name for word in process.cmdline()[:3]]
            name = f"{process.pid} {' '.join(words)[:40] or process.name()}"
            own = self.samples[name]
            own.seconds.append(now)
            own.values["rss_mib"].append(process.memory_info().rss / 2**20)
            own.values["fds"].append(process.num_fds())
            own.values["threads"].append(process.num_threads())
            told = path_of(self.folder, process.pid)
            if told.exists():
                in_use, num_blocks = told.read_text().split()
                own.values["in_use_mib"].append(float(in_use))
                own.values["python_blocks"].append(float(num_blocks))

    def report(self, warm_up: float) -> dict[str, Any]:
        """The trend of each quantity of each process, from ``warm_up`` seconds on."""
        return {
            name: {
                quantity: trend(own.seconds, values, warm_up)
                for quantity, values in own.values.items()
            }
            for name, own in self.samples.items()
            if len([s for s in own.seconds if s >= warm_up]) >= _NUM_PARTS
        }


def trend(seconds: list[float], values: list[float], warm_up: float) -> dict[str, Any]:
    """Least-squares slope per hour over the means of ten parts of the time, with its standard
    error, which so counts slow waves as noise; and what the slope adds over the whole time.

    is_flat: the sum is within two standard errors of zero, or below one percent of the mean.
    """
    pairs = [(s, v) for s, v in zip(seconds, values, strict=True) if s >= warm_up]
    size = len(pairs) // _NUM_PARTS
    parts = [pairs[i * size : (i + 1) * size] for i in range(_NUM_PARTS)]
    times = [fmean(s for s, _ in part) / 3600 for part in parts]
    means = [fmean(v for _, v in part) for part in parts]
    level = fmean(means)
    fitted, covariance = numpy.polyfit(times, means, 1, cov=True)
    slope, error = float(fitted[0]), float(covariance[0, 0]) ** 0.5
    hours = (pairs[-1][0] - pairs[0][0]) / 3600
    flat = abs(slope) <= 2 * error or abs(slope) * hours <= 0.01 * level
    return {
        "at_start": values[0],
        "mean": level,
        "first_part": means[0],
        "last_part": means[-1],
        "most": max(v for _, v in pairs),
        "slope_per_hour": slope,
        "standard_error": error,
        "grew": slope * hours,
        "samples": len(pairs),
        "is_flat": flat,
    }
