"""vLLM's schedulers, with this step's round plans attached to what they already send.

How many blocks go is arithmetic, so nothing ever flows back from the workers: plans travel
with the ``SchedulerOutput`` to every rank of tensor and pipeline parallelism, in order.
"""

from dataclasses import dataclass

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from triattention_vllm.engine.kv_manager import CompressedKVCacheManager, RoundPlan


@dataclass
class RoundsSchedulerOutput(SchedulerOutput):
    """A ``SchedulerOutput`` whose workers first carry out ``round_plans``, in order."""

    round_plans: tuple[RoundPlan, ...] = ()


def with_round_plans(
    output: SchedulerOutput, managers: list[CompressedKVCacheManager]
) -> SchedulerOutput:
    """Attach the plans that the managers noted during this step; without any, ``output``.

    vLLM zeroes freshly allocated blocks after the rounds ran. A block that was allocated and
    freed in this step and became a destination would be wiped, so it is taken off that list.
    """
    plans = tuple(plan for manager in managers for plan in manager.take_plans())
    if not plans:
        return output
    if output.new_block_ids_to_zero is not None:
        filled = {block for plan in plans for block in plan.destination_blocks}
        kept = [block for block in output.new_block_ids_to_zero if block not in filled]
        output.new_block_ids_to_zero = kept or None
    return RoundsSchedulerOutput(**vars(output), round_plans=plans)


class CompressionScheduler(Scheduler):
    """``Scheduler`` whose output carries round plans."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step, as vLLM schedules it, with the rounds that it started."""
        output = super().schedule(throttle_prefills)
        return with_round_plans(output, compressed_managers(self))


class CompressionAsyncScheduler(AsyncScheduler):
    """``AsyncScheduler`` whose output carries round plans."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step, as vLLM schedules it, with the rounds that it started."""
        output = super().schedule(throttle_prefills)
        return with_round_plans(output, compressed_managers(self))


def compressed_managers(scheduler: Scheduler) -> list[CompressedKVCacheManager]:
    """The managers of the KV-cache groups that are compressed."""
    return [
        manager
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
        if isinstance(manager, CompressedKVCacheManager)
    ]
