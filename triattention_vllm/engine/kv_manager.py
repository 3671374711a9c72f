"""Rows with a null head: the manager that decides rounds and gives blocks back to the pool.

A request's row of blocks keeps its logical length. A round puts null blocks at its head,
frees as many real ones and notes a plan; the workers carry it out before the same step runs.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from triattention_vllm.engine.differences import bound_admission, is_block_writable
from triattention_vllm.errors import RoundError
from triattention_vllm.log import log_once
from triattention_vllm.method.policy import Policy, Round
from triattention_vllm.request import Capacity, RequestSettings

if TYPE_CHECKING:
    from triattention_vllm.engine.spec import CompressedAttentionSpec


@dataclass(frozen=True)
class RoundPlan:
    """What every worker does for one round of one request, in one KV-cache group.

    nominal_boundary: ``N*``, the position of the next query for the score.
    source_blocks: physical ids of the region, from the block of the first candidate to ``P0``.
    first_candidate: protected tokens that lead the region and stay, below the block size.
    destination_blocks: physical ids that hold what is kept of the region, completely filled.
    row_start, row_blocks: the row from block index ``row_start`` on reads ``row_blocks`` now.
    """

    request_id: str
    group_id: int
    nominal_boundary: int
    source_blocks: tuple[int, ...]
    first_candidate: int
    destination_blocks: tuple[int, ...]
    row_start: int
    row_blocks: tuple[int, ...]

    @property
    def num_freed_blocks(self) -> int:
        """Blocks that the row lost: evicted tokens / block size."""
        return len(self.source_blocks) - len(self.destination_blocks)

    @property
    def num_protected_blocks(self) -> int:
        """Blocks between null head and region, which hold nothing but protected tokens."""
        return len(self.row_blocks) - len(self.source_blocks)

    @property
    def num_private_blocks(self) -> int:
        """Destination blocks that stand in the place of hashed or shared ones."""
        pairs = zip(self.source_blocks, self.destination_blocks, strict=False)
        return sum(source != destination for source, destination in pairs)


class CompressedKVCacheManager(FullAttentionManager):
    """vLLM's full-attention manager plus rounds.

    ``num_null_blocks`` holds ``E / block_size`` for every request that had a round; requests
    that had none are managed by vLLM's own code alone. ``requests`` are the scheduler's own, so
    that what a request asks for is looked up and never kept. ``pending_plans`` are those of this
    step, by request and group, in the order in which they were decided: of all groups of an
    engine, whose managers share them (``join_groups``).
    """

    kv_cache_spec: "CompressedAttentionSpec"

    def __init__(self, kv_cache_spec: "CompressedAttentionSpec", **kwargs: object) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # vLLM may have enlarged the block size since the settings were checked.
        kv_cache_spec.settings.check_block_size(self.block_size)
        self.policy = kv_cache_spec.policy
        self.rounds_wait_for_pressure = kv_cache_spec.settings.pressure is not None
        self.requests: Mapping[str, Request] = {}
        self.num_null_blocks: dict[str, int] = {}
        self.pending_plans: dict[tuple[str, int], RoundPlan] = {}
        self.num_deferred_rounds = 0
        self._own_policies: dict[str, tuple[Mapping[str, object], Policy | None]] = {}

    def policy_of(self, request_id: str) -> Policy | None:
        """The rounds of a request by its own budget, or None where it is not compressed.

        Read once of each ``extra_args``: vLLM asks several times a step, of every request.
        """
        request = self.requests.get(request_id)
        params = None if request is None else request.sampling_params
        if params is None or not params.extra_args:
            return self.policy
        wishes, policy = self._own_policies.get(request_id, (None, None))
        if wishes is not params.extra_args:
            policy = RequestSettings.from_extra_args(params.extra_args).policy(self.policy)
            self._own_policies[request_id] = params.extra_args, policy
        return policy

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """vLLM's count, where a request is admitted by the bound of its own budget. What else
        vLLM passes differs by version, and is passed on."""
        policy = self.policy_of(request_id)
        bound_admission(self, self.kv_cache_spec.max_blocks_per_request(policy))
        return int(super().get_num_blocks_to_allocate(request_id, *args, **kwargs))

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Start the round that is due for the request, if one is and rounds do not wait for
        pressure.

        vLLM calls this from ``allocate_slots`` with committed tokens only, before it allocates
        the step's blocks; it is where sliding-window managers drop their old blocks.
        """
        if self.rounds_wait_for_pressure or not self.req_to_blocks.get(request_id):
            return  # without blocks it waits: it gets them behind this call
        if num_prompt_tokens is None:
            raise RoundError(
                "vLLM called remove_skipped_blocks without num_prompt_tokens, which the policy "
                "needs to protect the prompt; this vLLM version is not supported"
            )
        self.start_due_round(request_id, processed_computed_tokens, num_prompt_tokens)

    def start_due_round(self, request_id: str, num_committed: int, num_prompt_tokens: int) -> None:
        """Start the round that is due for a running request at ``num_committed`` tokens, if one
        is."""
        policy = self.policy_of(request_id)
        if policy is None:
            return
        num_evicted = self.num_null_blocks.get(request_id, 0) * self.block_size
        due = policy.due_round(num_committed, num_evicted, num_prompt_tokens)
        if due is not None:
            self._start_round(request_id, due)

    def _start_round(self, request_id: str, due: Round) -> None:
        """Edit the row, free blocks, note the plan; or defer where no private block is free."""
        row = self.req_to_blocks[request_id]
        num_null = due.num_evicted_before // self.block_size
        num_new_null = due.num_newly_evicted // self.block_size
        first = num_null + due.first_candidate // self.block_size
        end = num_null + due.end_candidate // self.block_size
        source = row[first:end]
        num_destination = len(source) - num_new_null
        # A writable block is refilled in its place, so survivors only slide forward; in place
        # of a hashed or shared one comes a private block.
        in_place = [is_block_writable(self.block_pool, b) for b in source[:num_destination]]
        num_private = in_place.count(False)
        released = [b for b, kept in zip(source, in_place, strict=False) if not kept]
        released += source[num_destination:]
        num_released = sum(block.ref_cnt == 1 for block in released)
        if num_private > self.block_pool.get_num_free_blocks() + num_released:
            self.num_deferred_rounds += 1
            log_once(
                logging.WARNING,
                "KV compression: a round waits because its blocks are shared and the pool has "
                "no free ones; until one is free its request holds more than its budget. "
                "This is logged once.",
            )
            return
        # Released first: the workers read every source before anything is written.
        self.block_pool.free_blocks(reversed(released))
        private = iter(self.block_pool.get_new_blocks(num_private))
        destination = [
            block if kept else next(private) for block, kept in zip(source, in_place, strict=False)
        ]
        row[num_null:end] = [self._null_block] * num_new_null + row[num_null:first] + destination
        self.num_null_blocks[request_id] = num_null + num_new_null
        self.pending_plans[request_id, self.kv_cache_group_id] = RoundPlan(
            request_id=request_id,
            group_id=self.kv_cache_group_id,
            nominal_boundary=due.nominal_boundary,
            source_blocks=tuple(block.block_id for block in source),
            first_candidate=due.first_candidate % self.block_size,
            destination_blocks=tuple(block.block_id for block in destination),
            row_start=num_null,
            row_blocks=tuple(block.block_id for block in row[num_null:end]),
        )

    def take_plans(self) -> list[RoundPlan]:
        """Drain the plans of this step, of all groups, in the order in which they were decided."""
        plans = list(self.pending_plans.values())
        self.pending_plans.clear()
        return plans

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: through 0.31 vLLM counts the leading blocks that every running request holds,
        by their reference counts, and those of the null block are not kept."""
        del running_request_id
        return 0

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's real blocks; its null head and a plan not yet sent are forgotten.

        From 0.33 on vLLM leaves a null head out by itself.
        """
        self.pending_plans.pop((request_id, self.kv_cache_group_id), None)
        self.num_null_blocks.pop(request_id, None)
        self._own_policies.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]


def join_groups(coordinator: KVCacheCoordinator) -> list[CompressedKVCacheManager]:
    """Let the compressed groups of an engine act together; returns their managers.

    Their plans have one order. All groups take blocks from one pool, and block ``b`` is the same
    bytes in each: a plan of one group may write what an earlier plan of another reads.

    Block hashes are registered as vLLM does, until a request's first round. Behind it, block ``i``
    no longer holds what tokens ``i * block_size`` onwards would hold without compression, so
    nothing computed after it may serve another request: in no group, because the layers of other
    groups, linear states too, read what compressed layers computed.
    """
    compressed = [
        manager
        for manager in coordinator.single_type_managers
        if isinstance(manager, CompressedKVCacheManager)
    ]
    pending_plans: dict[tuple[str, int], RoundPlan] = {}
    for manager in compressed:
        manager.pending_plans = pending_plans
    register = coordinator.cache_blocks

    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        if not any(request.request_id in manager.num_null_blocks for manager in compressed):
            register(request, num_computed_tokens)

    coordinator.cache_blocks = cache_blocks
    return compressed


def leave_room_beside_hits(
    kv_cache_manager: KVCacheManager,
    managers: Sequence[CompressedKVCacheManager],
    capacity: Capacity,
) -> None:
    """From now on, of a prefix-cache hit that would fill the pool only its beginning is taken.

    A request holds its whole hit until its first round, a step later. In a pool that is smaller
    than its prompt it would wait for the room that its own hit takes, for ever. So what a hit takes
    of free blocks leaves room in all groups for the request's next chunk, for a copy of the block
    in which it may end, and for a block of every request beside it. Blocks that other requests
    hold cost nothing. What a request is promised, ``B + I`` of its own budget, it may always take,
    and wait for; one that is not compressed is promised all that it has room for.

    managers: of the compressed groups. capacity: of each of them.
    """
    coordinator = kv_cache_manager.coordinator
    of_request, find = kv_cache_manager.get_computed_blocks, coordinator.find_longest_cache_hit
    pool, spec = coordinator.block_pool, managers[0].kv_cache_spec
    in_flight = cdiv(capacity.max_in_flight_tokens, capacity.block_size)
    num_copies = cdiv(len(coordinator.single_type_managers), len(managers))
    promised: int | None = None

    def get_computed_blocks(
        request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int]:
        nonlocal promised
        promised = spec.max_blocks_per_request(managers[0].policy_of(request.request_id))
        return of_request(request, *args, **kwargs)

    def find_longest_cache_hit(
        block_hashes: Sequence[bytes], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        found = find(block_hashes, max_cache_hit_length)
        if promised is None:
            return found
        num_used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        num_beside = len(managers[0].req_to_blocks)
        left = capacity.num_blocks - cdiv(num_used, len(managers)) - num_beside
        most_free = max(promised, left) - in_flight - num_copies
        if found[1] <= most_free * capacity.block_size:
            return found  # nearly always, and nothing is counted
        longest = capacity.block_size * min(
            num_leading_blocks(found[0][manager.kv_cache_group_id], most_free)
            for manager in managers
        )
        return found if found[1] <= longest else find(block_hashes, longest)

    kv_cache_manager.get_computed_blocks = get_computed_blocks
    coordinator.find_longest_cache_hit = find_longest_cache_hit


def num_leading_blocks(blocks: Sequence[KVCacheBlock], most_free: int) -> int:
    """How many of a hit's blocks, from the first on, take at most ``most_free`` free ones."""
    is_free = accumulate(block.ref_cnt == 0 for block in blocks)
    return sum(num_free <= most_free for num_free in is_free)
