"""One log line an interval, as vLLM's own statistics have, while compression does something."""

import threading

from triattention_vllm.log import logger


class PeriodicLog:
    """Collects what happened in an interval of ``seconds``, which begins with a round.

    So an engine without rounds logs nothing, and one that falls idle still reports its last ones.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._begin()

    def _begin(self) -> None:
        self._num_freed_blocks = 0
        self._num_preemptions = 0
        self._num_logical = 0
        self._num_cached = 0

    def count(
        self, num_freed_blocks: int, num_preemptions: int, num_logical: int, num_cached: int
    ) -> None:
        """Count a step: what its rounds freed, and the tokens of the requests that run in it."""
        with self._lock:
            if self._timer is None and num_freed_blocks > 0:
                self._timer = threading.Timer(self._seconds, self._end)
                self._timer.daemon = True
                self._timer.start()
            if self._timer is not None:
                self._num_freed_blocks += num_freed_blocks
                self._num_preemptions += num_preemptions
                self._num_logical += num_logical
                self._num_cached += num_cached

    def stop(self) -> None:
        """Log what was not logged yet; no timer is left."""
        with self._lock:
            if self._timer is None:
                return
            self._timer.cancel()
        self._end()

    def _end(self) -> None:
        """Log the interval: its sums, and its mean ratio of tokens over steps."""
        with self._lock:
            fewer = self._num_logical / max(1, self._num_cached)
            line = (
                f"KV compression: {self._num_freed_blocks:,} blocks freed, {fewer:.1f}x fewer "
                f"cached tokens, {self._num_preemptions:,} preemptions"
            )
            self._timer = None
            self._begin()
        logger.info(line)
