"""Rounds that wait for a full pool: decided before a step is scheduled, where blocks are held.

vLLM preempts inside ``schedule()`` when a running request finds no block. So what its running
requests may take in the step counts as needed already, and a pool that is needed beyond the
threshold gets its rounds first.
"""

from collections.abc import Mapping, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

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

    def relieve(self, requests: Mapping[str, Request]) -> None:
        """Start due rounds, longest cache first, until the pool is not needed beyond the
        threshold; the others keep all their tokens.

        requests: all of the engine, by id. Those that hold blocks run, or wait for the next input
        of a session: vLLM cannot preempt such, and its next step may need their room.
        """
        rows = self.managers[0].req_to_blocks
        most = self._most_taken(len(rows))
        if not self._is_on(most):
            self.is_on = False
            return
        holding = [requests[request_id] for request_id, row in rows.items() if row]
        taken = min(most, sum(map(self._taken_by, holding)))
        self.is_on = self._is_on(taken)
        for request in sorted(holding, key=self._num_cached, reverse=True):
            if not self.is_on:
                return
            for manager in self.managers:
                manager.start_due_round(
                    request.request_id, num_committed(request), request.num_prompt_tokens
                )
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


def num_committed(request: Request) -> int:
    """Tokens that the request has computed, without those of steps in flight."""
    return max(0, int(request.num_computed_tokens) - int(request.num_in_flight_tokens))
