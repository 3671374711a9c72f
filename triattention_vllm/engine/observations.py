"""What a worker tells a scorer that looks at queries: the queries, and earlier scores."""

from collections.abc import Sequence

from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.recorded_queries import RecordedQueries
from triattention_vllm.method.scorer import Observation


class Observations:
    """Of every running request of one KV-cache group: its last queries and, for a scorer that
    accumulates, what its survivors scored in the round before.

    Survivors stay in order, so their scores are those of the first tokens of the next region,
    which begins at the same block, or further on where the protected prompt has grown. A preempted
    request starts again without a null head: its first round then finds no earlier scores, as the
    very first one did.
    """

    def __init__(self, queries: RecordedQueries, accumulates: bool, block_size: int) -> None:
        self.queries = queries
        self._accumulates = accumulates
        self._block_size = block_size
        self._earlier: dict[str, tuple[int, Tensor]] = {}  # blocks before the region, scores

    def begin_step(self, step: SchedulerOutput | None) -> None:
        """See ``RecordedQueries.begin_step``; finished requests are forgotten."""
        self.queries.begin_step(step)
        for request_id in () if step is None else step.finished_req_ids:
            self._earlier.pop(request_id, None)

    def of(self, plan: RoundPlan) -> Observation:
        """For the round that ``plan`` is."""
        queries = self.queries.before(plan.request_id, plan.nominal_boundary)
        is_first = plan.row_start == 0
        if is_first or not self._accumulates:
            return Observation(queries, None)
        num_before, earlier = self._earlier[plan.request_id]
        num_passed = (plan.num_protected_blocks - num_before) * self._block_size
        return Observation(queries, earlier[..., num_passed:])

    def keep(self, plans: Sequence[RoundPlan], scores: Tensor, kept: Tensor) -> None:
        """What the survivors of these rounds scored. scores: [R, L, H_kv, region tokens]; kept:
        region token indices [R, L, H_kv, destination tokens], padded."""
        if not self._accumulates:
            return
        for request_idx, plan in enumerate(plans):
            own = kept[request_idx, ..., : len(plan.destination_blocks) * self._block_size]
            scored = scores[request_idx].gather(-1, own)
            self._earlier[plan.request_id] = plan.num_protected_blocks, scored
