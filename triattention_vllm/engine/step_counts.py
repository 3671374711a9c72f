"""What the scheduler counts after each step: rounds, blocks and tokens, for metrics and log."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from triattention_vllm.engine.kv_manager import CompressedKVCacheManager, RoundPlan
from triattention_vllm.engine.metrics_file import MetricsFile
from triattention_vllm.engine.periodic_log import PeriodicLog
from triattention_vllm.metrics import (
    CACHED_TOKENS_NOW,
    COMPRESSED_REQUESTS,
    COPY_ON_WRITE_BLOCKS,
    DEFERRED_ROUNDS,
    EVICTED_TOKENS,
    FREED_BLOCKS,
    LOGICAL_TOKENS_NOW,
    REQUEST_CACHED_TOKENS,
    ROUNDS,
)

STEP_METRICS = (
    ROUNDS,
    EVICTED_TOKENS,
    FREED_BLOCKS,
    DEFERRED_ROUNDS,
    COPY_ON_WRITE_BLOCKS,
    COMPRESSED_REQUESTS,
    CACHED_TOKENS_NOW,
    LOGICAL_TOKENS_NOW,
    REQUEST_CACHED_TOKENS,
)


@dataclass
class StepCounts:
    """Counts the steps of one engine into its metrics and its log.

    managers: of the compressed KV-cache groups. max_cached: request -> most tokens cached so far.
    """

    managers: Sequence[CompressedKVCacheManager]
    metrics: MetricsFile
    log: PeriodicLog
    max_cached: dict[str, int] = field(default_factory=dict)
    compressed: set[str] = field(default_factory=set)
    num_deferred: int = 0

    def count(
        self, output: SchedulerOutput, plans: Sequence[RoundPlan], running: Sequence[Request]
    ) -> None:
        """Count a step that was scheduled, with its rounds. ``running``: of the scheduler; its
        requests have advanced by the step's tokens already."""
        num_freed = self._count_rounds(plans)
        num_logical, num_cached = self._count_tokens(running)
        self._count_finished(output.finished_req_ids)
        num_preempted = len(output.preempted_req_ids or ())
        self.log.count(num_freed, num_preempted, num_logical, num_cached)

    def count_end(self, finished: Collection[str], running: Sequence[Request]) -> None:
        """Count the end of a step in which requests ended: behind it an engine without requests
        schedules no other. ``finished``: who was counted before is not counted again."""
        if finished or not running:
            self._count_tokens(running)
            self._count_finished(finished)

    def close(self) -> None:
        """Take the gauges away and log what was not logged yet."""
        self.log.stop()
        self.metrics.close()

    def _count_rounds(self, plans: Sequence[RoundPlan]) -> int:
        """Count the step's rounds; returns the blocks that they free."""
        num_deferred = sum(manager.num_deferred_rounds for manager in self.managers)
        if num_deferred > self.num_deferred:
            self.metrics.add(DEFERRED_ROUNDS, num_deferred - self.num_deferred)
            self.num_deferred = num_deferred
        if not plans:
            return 0
        block_sizes = {m.kv_cache_group_id: m.block_size for m in self.managers}
        num_freed = sum(plan.num_freed_blocks for plan in plans)
        num_evicted = sum(p.num_freed_blocks * block_sizes[p.group_id] for p in plans)
        first_time = {plan.request_id for plan in plans} - self.compressed
        self.compressed |= first_time
        self.metrics.add(ROUNDS, len(plans))
        self.metrics.add(FREED_BLOCKS, num_freed)
        self.metrics.add(EVICTED_TOKENS, num_evicted)
        self.metrics.add(COPY_ON_WRITE_BLOCKS, sum(plan.num_private_blocks for plan in plans))
        self.metrics.add(COMPRESSED_REQUESTS, len(first_time))
        return num_freed

    def _count_finished(self, finished: Iterable[str]) -> None:
        for request_id in finished:
            self.compressed.discard(request_id)
            if request_id in self.max_cached:
                self.metrics.observe(REQUEST_CACHED_TOKENS, self.max_cached.pop(request_id))

    def _count_tokens(self, running: Sequence[Request]) -> tuple[int, int]:
        """Bring the gauges up to date; returns them: tokens computed, tokens cached."""
        evicted = evicted_tokens(self.managers)
        num_logical = num_cached = 0
        for request in running:
            cached = request.num_computed_tokens - evicted.get(request.request_id, 0)
            num_logical += request.num_computed_tokens
            num_cached += cached
            if cached > self.max_cached.get(request.request_id, 0):
                self.max_cached[request.request_id] = cached
        self.metrics.set(LOGICAL_TOKENS_NOW, num_logical)
        self.metrics.set(CACHED_TOKENS_NOW, num_cached)
        return num_logical, num_cached


def evicted_tokens(managers: Sequence[CompressedKVCacheManager]) -> Mapping[str, int]:
    """Request -> ``E``, for the requests that hold blocks and had a round; where the groups
    differ because one of them had to wait, the smallest."""
    first, *others = (
        {request_id: n * manager.block_size for request_id, n in manager.num_null_blocks.items()}
        for manager in managers
    )
    for other in others:
        first = {request_id: min(n, other.get(request_id, 0)) for request_id, n in first.items()}
    return first
