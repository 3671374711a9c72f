"""Rounds that are decided before a step is scheduled: of a full pool, and of parked sessions.

vLLM preempts inside ``schedule()`` when a running request finds no block. So what its running
requests may take in the step counts as needed already, and a pool that is needed beyond the
threshold gets its rounds first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request, RequestStatus

from triattention_vllm.engine.kv_manager import CompressedKVCacheManager
from triattention_vllm.method.pressure import Pressure

LOOK_AHEAD = 2
"""Tokens behind the committed ones that a running request is taken to need. Asynchronous
scheduling takes the second before it hears of the first; counted always, pressure is noticed at
the same committed tokens, and so at the same nominal boundaries."""


class PoolPressure:
    """Whether rounds run, from one step to the next, and in which order they relieve the pool.

    managers: of the groups that are compressed. all_managers: of all KV-cache groups, which take
        blocks from the same pool. max_new_tokens: tokens of one step, at most; drafts come on top.
    """

    def __init__(
        self,
        thresholds: Pressure,
        managers: Sequence[CompressedKVCacheManager],
        block_pool: BlockPool,
        all_managers: Sequence[SingleTypeKVCacheManager],
        max_new_tokens: int,
        num_lookahead_tokens: int,
    ) -> None:
        self.thresholds = thresholds
        self.managers = managers
        self.block_pool = block_pool
        self.all_managers = all_managers
        self.max_new_tokens = max_new_tokens
        self.num_lookahead_tokens = num_lookahead_tokens
        self.is_on = False

    def relieve(self, requests: Mapping[str, Request], is_stuck: bool) -> None:
        """Start due rounds, longest cache first, until the pool is not needed beyond the
        threshold; the others keep all their tokens. See ``start_rounds``."""
        if is_stuck:
            for request in holding(self.managers, requests):
                start_due_rounds(self.managers, request)
        most = self._most_taken(len(self.managers[0].req_to_blocks))
        if not self._is_on(most):
            self.is_on = False
            return
        own = holding(self.managers, requests)
        taken = min(most, sum(map(self._taken_by, own)))
        self.is_on = self._is_on(taken)
        for request in sorted(own, key=self._num_cached, reverse=True):
            if not self.is_on:
                return
            start_due_rounds(self.managers, request)
            self.is_on = self._is_on(taken)

    def _is_on(self, num_taken: int) -> bool:
        """The threshold's answer where the step takes ``num_taken`` blocks."""
        num_blocks = self.block_pool.num_gpu_blocks - 1
        num_held = num_blocks - self.block_pool.get_num_free_blocks()
        return self.thresholds.is_on(self.is_on, num_held + num_taken, num_blocks)

    def _most_taken(self, num_holding: int) -> int:
        """Blocks that a step can take of which ``num_holding`` requests may be part, without
        looking at them."""
        num_blocks = 0
        for manager in self.all_managers:
            ahead = cdiv(LOOK_AHEAD + self.num_lookahead_tokens, manager.block_size)
            num_blocks += cdiv(self.max_new_tokens, manager.block_size) + num_holding * (1 + ahead)
        return num_blocks

    def _taken_by(self, request: Request) -> int:
        """Blocks that the request takes, at most, if it is scheduled as far as it can."""
        known = request.num_tokens_with_spec + request.num_output_placeholders
        end = min(known, request.num_computed_tokens + self.max_new_tokens)
        end = max(end, num_committed(request) + LOOK_AHEAD)
        end += self.num_lookahead_tokens
        return sum(
            max(0, cdiv(end, manager.block_size) - len(manager.req_to_blocks[request.request_id]))
            for manager in self.all_managers
        )

    def _num_cached(self, request: Request) -> int:
        manager = self.managers[0]
        num_null = manager.num_null_blocks.get(request.request_id, 0)
        return int(request.num_computed_tokens) - num_null * manager.block_size


def start_rounds(
    managers: Sequence[CompressedKVCacheManager],
    pressure: PoolPressure | None,
    requests: Mapping[str, Request],
    num_running: int,
    is_stuck: bool,
) -> None:
    """The rounds of a step that ``allocate_slots`` does not start: under pressure, and of requests
    that hold blocks and are not scheduled. Such wait for the next input of a session: vLLM cannot
    preempt them, and others may need their room.

    requests: all of the engine, by id. is_stuck: see ``WithoutRoom.are_stuck``.
    """
    if pressure is not None:
        pressure.relieve(requests, is_stuck)
    elif len(managers[0].req_to_blocks) > num_running:
        for request in holding(managers, requests):
            if request.status != RequestStatus.RUNNING:
                start_due_rounds(managers, request)


class WithoutRoom:
    """Which requests found no room in the step before, and whether they wait for ever."""

    def __init__(self, kv_cache_manager: KVCacheManager) -> None:
        self._refused: set[str] = set()
        self._ran_nothing = False
        allocate = kv_cache_manager.allocate_slots

        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
            found = allocate(request, *args, **kwargs)
            if found is None:
                self._refused.add(request.request_id)
            return found

        kv_cache_manager.allocate_slots = allocate_slots

    def begin_step(self) -> None:
        """From now on requests are asked about their room again."""
        self._refused.clear()

    def end_step(self, num_scheduled: int, num_running: int) -> None:
        """What was scheduled, and what runs."""
        self._ran_nothing = not (num_scheduled or num_running)

    def are_stuck(self, requests: Mapping[str, Request]) -> bool:
        """Whether the step ran nothing, and one that found no room still waits for it: it has none
        beside requests that hold blocks and do not run, and never will unless these are compressed.
        """
        waits = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        return self._ran_nothing and any(
            requests[request_id].status in waits for request_id in self._refused & requests.keys()
        )


def holding(
    managers: Sequence[CompressedKVCacheManager], requests: Mapping[str, Request]
) -> list[Request]:
    """The requests that hold blocks."""
    return [requests[request_id] for request_id, row in managers[0].req_to_blocks.items() if row]


def start_due_rounds(managers: Sequence[CompressedKVCacheManager], request: Request) -> None:
    """The request's round in every group, where one is due."""
    for manager in managers:
        manager.start_due_round(
            request.request_id, num_committed(request), request.num_prompt_tokens
        )


def num_committed(request: Request) -> int:
    """Tokens that the request has computed, without those of steps in flight."""
    return max(0, int(request.num_computed_tokens) - int(request.num_in_flight_tokens))
