"""vLLM's schedulers, with this step's rounds attached to what they already send.

How many blocks go is arithmetic, so nothing ever flows back from the workers: plans travel
with the ``SchedulerOutput`` to every rank of tensor and pipeline parallelism, in order.
"""

from dataclasses import dataclass, field
from typing import Any

import vllm.envs as envs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from triattention_vllm.engine.kv_manager import (
    CompressedKVCacheManager,
    RoundPlan,
    join_groups,
    leave_room_beside_hits,
)
from triattention_vllm.engine.metrics_file import metrics_file
from triattention_vllm.engine.periodic_log import PeriodicLog
from triattention_vllm.engine.pressure import PoolPressure, WithoutRoom, start_rounds
from triattention_vllm.engine.requests import keep_servable
from triattention_vllm.engine.spec import group_capacity
from triattention_vllm.engine.step_counts import STEP_METRICS, StepCounts
from triattention_vllm.engine.trace import step_trace


@dataclass
class RoundsSchedulerOutput(SchedulerOutput):
    """A ``SchedulerOutput`` of a step with compressed requests.

    round_plans: of all KV-cache groups, carried out first, in this order.
    null_heads: KV-cache group -> request -> null blocks at the head of its row, for the
        requests of this step that have any; so that a worker keeps no count of its own.
    """

    round_plans: tuple[RoundPlan, ...] = ()
    null_heads: dict[int, dict[str, int]] = field(default_factory=dict)


def with_rounds(
    output: SchedulerOutput, managers: list[CompressedKVCacheManager]
) -> SchedulerOutput:
    """Attach the plans that the managers of an engine's compressed groups noted during this step,
    and the null heads of its rows; a step that has neither is returned as it is.

    vLLM zeroes freshly allocated blocks after the rounds ran. A block that was allocated and
    freed in this step and became a destination would be wiped, so it is taken off that list.
    """
    plans = tuple(managers[0].take_plans())
    null_heads = {
        manager.kv_cache_group_id: {
            request_id: manager.num_null_blocks[request_id]
            for request_id in output.num_scheduled_tokens
            if request_id in manager.num_null_blocks
        }
        for manager in managers
    }
    if not plans and not any(null_heads.values()):
        return output
    if plans and output.new_block_ids_to_zero is not None:
        filled = {block for plan in plans for block in plan.destination_blocks}
        kept = [block for block in output.new_block_ids_to_zero if block not in filled]
        output.new_block_ids_to_zero = kept or None
    return RoundsSchedulerOutput(**vars(output), round_plans=plans, null_heads=null_heads)


class CompressionScheduler(Scheduler):
    """``Scheduler`` whose output carries rounds, which counts them, and whose requests may have
    a budget of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compressed_managers = join_groups(self.kv_cache_manager.coordinator)
        self.settings = self.compressed_managers[0].kv_cache_spec.settings
        self.capacity = group_capacity(self.vllm_config, self.kv_cache_config)
        leave_room_beside_hits(self.kv_cache_manager, self.compressed_managers, self.capacity)
        for manager in self.compressed_managers:
            manager.requests = self.requests
        self.pressure = pool_pressure(self)
        self.without_room = None
        if self.pressure is not None:
            self.without_room = WithoutRoom(self.kv_cache_manager)
        metrics = metrics_file(self.vllm_config, STEP_METRICS) if self.log_stats else None
        self.step_counts: StepCounts | None = None
        if metrics is not None:
            log = PeriodicLog(envs.VLLM_LOG_STATS_INTERVAL)
            self.step_counts = StepCounts(self.compressed_managers, metrics, log)
        self.trace = step_trace(self.vllm_config, self.settings, self.compressed_managers)

    def add_request(self, request: Request) -> None:
        """vLLM's own, for a request whose wishes can be served."""
        keep_servable(request, self.settings, self.capacity)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step, as vLLM schedules it, with the rounds that it started."""
        managers, running, without_room = self.compressed_managers, self.running, self.without_room
        is_stuck = without_room is not None and without_room.are_stuck(self.requests)
        start_rounds(managers, self.pressure, self.requests, len(running), is_stuck)
        if without_room is not None and not throttle_prefills:
            without_room.begin_step()
        output = with_rounds(super().schedule(throttle_prefills), managers)
        if without_room is not None and not throttle_prefills:
            without_room.end_step(len(output.num_scheduled_tokens), len(self.running))
        if self.step_counts is not None:
            self.step_counts.count(output, plans_of(output), self.running)
        if self.trace is not None:
            self.trace.record(output, plans_of(output), self.running)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """The end of a step, as vLLM takes it; what ended with it is counted."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        if self.step_counts is not None:
            self.step_counts.count_end(self.finished_req_ids, self.running)
        return outputs

    def shutdown(self) -> None:
        """Also end what counts."""
        super().shutdown()
        if self.step_counts is not None:
            self.step_counts.close()


class CompressionAsyncScheduler(CompressionScheduler, AsyncScheduler):
    """``AsyncScheduler`` with the same additions."""


def plans_of(output: SchedulerOutput) -> tuple[RoundPlan, ...]:
    """The rounds of a step."""
    return output.round_plans if isinstance(output, RoundsSchedulerOutput) else ()


def pool_pressure(scheduler: CompressionScheduler) -> PoolPressure | None:
    """What starts rounds before a step, or None where a due round never waits for pressure."""
    thresholds = scheduler.settings.pressure
    if thresholds is None:
        return None
    return PoolPressure(
        thresholds,
        scheduler.compressed_managers,
        scheduler.kv_cache_manager.block_pool,
        scheduler.kv_cache_manager.coordinator.single_type_managers,
        max_new_tokens=scheduler.max_num_scheduled_tokens,
        num_lookahead_tokens=scheduler.num_lookahead_tokens,
    )
