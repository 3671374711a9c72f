"""How long rounds take, measured on the device without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from triattention_vllm.engine.metrics_file import MetricsFile
from triattention_vllm.metrics import ROUND_TIME


class RoundTime:
    """Observes the seconds per round of one worker into its metrics.

    On the CPU a round is over when its call returns. On a GPU two events enclose its kernels and
    are read in a later step, once the device has passed them: nothing here synchronises.
    """

    def __init__(self, metrics: MetricsFile | None, device: torch.device) -> None:
        self._metrics = metrics
        self._is_cuda = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    @contextmanager
    def measured(self, num_rounds: int) -> Iterator[None]:
        """Around the launches of ``num_rounds`` rounds."""
        if self._metrics is None:
            yield
        elif self._is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end, num_rounds))
        else:
            before = time.perf_counter()
            yield
            self._observe(time.perf_counter() - before, num_rounds)

    def read_finished(self) -> None:
        """Observe the rounds that the device has finished since; the others stay for later."""
        while self._pending and self._pending[0][1].query():
            begin, end, num_rounds = self._pending.popleft()
            self._observe(begin.elapsed_time(end) / 1000, num_rounds)

    def _observe(self, seconds: float, num_rounds: int) -> None:
        assert self._metrics is not None
        for _ in range(num_rounds):
            self._metrics.observe(ROUND_TIME, seconds / num_rounds)
