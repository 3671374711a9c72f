"""vLLM's real KVCacheManager and BlockPool under a small scheduler, with a memory that tells.

Every slot of the simulated device memory remembers which token of which group was written into
it, so after any sequence of requests, rounds, aborts and preemptions a row can be read back and
compared with what its request must hold. As in vLLM, block ``b`` of one group is the same memory as
block ``b`` of another.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_manager import RoundPlan, join_groups, leave_room_beside_hits
from triattention_vllm.engine.pressure import PoolPressure, WithoutRoom, start_rounds
from triattention_vllm.engine.requests import keep_servable
from triattention_vllm.engine.rounds import runs
from triattention_vllm.engine.spec import CompressedAttentionSpec
from triattention_vllm.request import Capacity

IN_WORLD = Settings(budget=48, interval=8, window=8, sink_tokens=2)
"""Rounds come quickly: with blocks of 4 a request is compressed at 56 tokens."""
MAX_MODEL_LEN = 1 << 20
Token = tuple[int, int, int]
"""(group, position, hash of the tokens up to it): equal for equal prefixes of requests."""

SLIDING_WINDOW = 10
"""Tokens that layers with a window read, where a world has some beside compressed ones."""


@dataclass
class Live:
    """A running request: what it must hold in the cache of each compressed group, in order."""

    request: Request
    of_group: list[list[Token]] = field(default_factory=list)
    num_rounds: int = 0
    in_flight: list[int] = field(default_factory=list)
    num_hits: int = 0

    @property
    def cached(self) -> list[Token]:
        """What it must hold in the first group."""
        return self.of_group[0]


class PoolWorld:
    """``settings`` over ``num_blocks`` blocks; ``depth`` steps may be in flight at once, and all
    requests of a step share ``max_batched`` tokens. Of ``num_groups`` compressed groups above one
    there is a group with a sliding window beside them, as in the models that have several."""

    def __init__(
        self,
        settings: Settings,
        block_size: int,
        num_blocks: int,
        *,
        prefix_caching: bool = True,
        depth: int = 1,
        max_batched: int = 64,
        num_groups: int = 1,
    ) -> None:
        init_none_hash(sha256)
        base = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        spec = CompressedAttentionSpec.from_full_attention(base, settings, depth * max_batched)
        specs: list[FullAttentionSpec | SlidingWindowSpec] = [spec] * num_groups
        if num_groups > 1:
            specs.append(
                SlidingWindowSpec(
                    block_size=block_size,
                    num_kv_heads=1,
                    head_size=8,
                    dtype=torch.float32,
                    sliding_window=SLIDING_WINDOW,
                )
            )
        config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec(layer_names=[f"layer {i}"], kv_cache_spec=one)
                for i, one in enumerate(specs)
            ],
        )
        self.kv = KVCacheManager(
            config,
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            max_in_flight_tokens=depth * max_batched,
            enable_caching=prefix_caching,
        )
        self.all_managers = self.kv.coordinator.single_type_managers
        self.managers = join_groups(self.kv.coordinator)
        self.manager = self.managers[0]
        self.requests: dict[str, Request] = {}
        for manager in self.managers:
            manager.requests = self.requests
        self.pool = self.kv.block_pool
        self.settings = settings
        own_blocks = (num_blocks - 1) // len(specs)
        self.capacity = Capacity(own_blocks, block_size, MAX_MODEL_LEN, depth * max_batched)
        leave_room_beside_hits(self.kv, self.managers, self.capacity)
        self.pressure = None
        if settings.pressure is not None:
            self.pressure = PoolPressure(
                settings.pressure, self.managers, self.pool, self.all_managers, max_batched, 0
            )
        self.block_size = block_size
        self.depth = depth
        self.max_batched = max_batched
        self.hasher = get_request_block_hasher(block_size, sha256)
        self.memory: dict[tuple[int, int], Token] = {}
        self.live: dict[str, Live] = {}
        self.waiting: list[Live] = []
        self.parked: dict[str, Live] = {}
        self.without_room = WithoutRoom(self.kv)
        self.num_preemptions = 0
        self.plans: list[RoundPlan] = []

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 1 << 16,
        extra_args: dict[str, object] | None = None,
    ) -> None:
        """Queue a request, which may ask for a budget of its own."""
        request = Request(
            request_id,
            prompt,
            SamplingParams(max_tokens=max_tokens, extra_args=extra_args),
            None,
            block_hasher=self.hasher,
        )
        keep_servable(request, self.settings, self.capacity)
        self.requests[request_id] = request
        self.waiting.append(Live(request))

    def finish(self, request_id: str) -> None:
        """End or abort a running request: its blocks go back."""
        live = self.live.pop(request_id)
        self.kv.free(live.request)
        del self.requests[request_id]

    def park(self, request_id: str) -> None:
        """Let a session wait for its next input: it keeps its blocks and cannot be preempted."""
        while self.live[request_id].in_flight:
            self._commit(self.live[request_id])
        self.live[request_id].request.status = RequestStatus.WAITING_FOR_STREAMING_REQ
        self.parked[request_id] = self.live.pop(request_id)

    def unpark(self, request_id: str, tokens: list[int]) -> None:
        """The session's next input; it is scheduled with the requests that run."""
        self.parked[request_id].request.append_output_token_ids(tokens)
        self.parked[request_id].request.status = RequestStatus.RUNNING
        self.live[request_id] = self.parked.pop(request_id)

    def step(self) -> list[RoundPlan]:
        """Schedule every request it can, run the rounds, then write the step's tokens."""
        self.settle()
        is_stuck = self.without_room.are_stuck(self.requests)
        start_rounds(self.managers, self.pressure, self.requests, len(self.live), is_stuck)
        self.without_room.begin_step()
        self.token_budget = self.max_batched
        scheduled: list[tuple[Live, int]] = []
        for live in list(self.live.values()):
            if live.request.request_id in self.live:
                self._schedule_running(live, scheduled)
        while self.waiting and self._admit(self.waiting[0], scheduled):
            self.waiting.pop(0)
        self.without_room.end_step(len(scheduled), len(self.live))
        plans = self.manager.take_plans()
        self.plans += plans
        # Raises where no order of launches would read everything before it is overwritten.
        for run in runs(plans):
            for group_id in reversed(run):
                for plan in reversed(run[group_id]):
                    self._run(plan)
        for live, num_new in scheduled:
            if live.request.request_id in self.live:
                self._write(live, num_new)
        return plans

    def settle(self) -> None:
        """Commit the oldest step in flight, and what a request has to wait for: its tokens are
        computed, one token is sampled. Requests that have their last token end."""
        for live in list(self.live.values()):
            if len(live.in_flight) >= self.depth:
                self._commit(live)
            while live.in_flight and self._num_missing(live) <= 0:
                self._commit(live)
            if live.request.num_output_tokens >= live.request.max_tokens:
                self.finish(live.request.request_id)

    def _commit(self, live: Live) -> None:
        request = live.request
        request.num_in_flight_tokens -= live.in_flight.pop(0)
        if request.num_computed_tokens + 1 > request.num_tokens:
            request.append_output_token_ids(len(request.output_token_ids) % 50)

    def _num_missing(self, live: Live) -> int:
        return int(live.request.num_tokens - live.request.num_computed_tokens)

    def _schedule_running(self, live: Live, scheduled: list[tuple[Live, int]]) -> None:
        num_new = min(self._num_missing(live), self.token_budget)
        if num_new <= 0:
            return
        while self.kv.allocate_slots(live.request, num_new) is None:
            victim = list(self.live.values())[-1]
            self._preempt(victim)
            self.token_budget += sum(n for other, n in scheduled if other is victim)
            scheduled[:] = [(other, n) for other, n in scheduled if other is not victim]
            if victim is live:
                return
        self.token_budget -= num_new
        scheduled.append((live, num_new))

    def _admit(self, live: Live, scheduled: list[tuple[Live, int]]) -> bool:
        request = live.request
        if self.token_budget == 0:
            return False
        blocks, num_hits, _ = self.kv.get_computed_blocks(request)
        num_new = min(request.num_tokens - num_hits, self.token_budget)
        got = self.kv.allocate_slots(
            request,
            num_new,
            num_new_computed_tokens=num_hits,
            new_computed_blocks=blocks,
            full_sequence_must_fit=True,
        )
        if got is None:
            return False
        request.num_computed_tokens = num_hits
        live.num_hits = num_hits
        request.status = RequestStatus.RUNNING
        live.of_group = [
            [self._token(request, position, group) for position in range(num_hits)]
            for group in range(len(self.managers))
        ]
        self.live[request.request_id] = live
        self.token_budget -= num_new
        scheduled.append((live, num_new))
        return True

    def _preempt(self, live: Live) -> None:
        self.num_preemptions += 1
        num_deferred = sum(manager.num_deferred_rounds for manager in self.managers)
        if self.pressure is not None and not num_deferred:
            assert not any(map(self.is_round_due, self.live.values())), "compress before preempting"
        request = live.request
        del self.live[request.request_id]
        self.kv.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_in_flight_tokens = 0
        self.waiting.insert(0, Live(request))

    def is_round_due(self, live: Live) -> bool:
        """Whether the request has more committed tokens than its policy wants to keep."""
        request = live.request
        policy = self.manager.policy_of(request.request_id)
        num_null = self.manager.num_null_blocks.get(request.request_id, 0)
        num_committed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        num_evicted = num_null * self.block_size
        return policy is not None and bool(
            policy.due_round(num_committed, num_evicted, request.num_prompt_tokens)
        )

    def _token(self, request: Request, position: int, group: int) -> Token:
        return group, position, hash(tuple(request.all_token_ids[: position + 1]))

    def _run(self, plan: RoundPlan) -> None:
        """What a worker does, with an arbitrary selection: keep the region's last tokens."""
        live = (self.live | self.parked)[plan.request_id]
        size = self.block_size
        region = [self.memory[block, slot] for block in plan.source_blocks for slot in range(size)]
        num_kept = len(plan.destination_blocks) * size
        num_survivors = num_kept - plan.first_candidate
        kept = region[: plan.first_candidate] + region[len(region) - num_survivors :]
        for i, token in enumerate(kept):
            self.memory[plan.destination_blocks[i // size], i % size] = token
        cached = live.of_group[plan.group_id]
        start = cached.index(region[0])
        assert cached[start : start + len(region)] == region
        cached[start : start + len(region)] = kept
        live.num_rounds += plan.group_id == 0

    def _write(self, live: Live, num_new: int) -> None:
        request = live.request
        first = request.num_computed_tokens
        for group, manager in enumerate(self.all_managers):
            row = manager.req_to_blocks[request.request_id]
            for position in range(first, first + num_new):
                block = row[position // self.block_size]
                assert not block.is_null
                token = self._token(request, position, group)
                self.memory[block.block_id, position % self.block_size] = token
                if manager in self.managers:
                    live.of_group[group].append(token)
        request.num_computed_tokens += num_new
        request.num_in_flight_tokens += num_new
        live.in_flight.append(num_new)

    def check_invariants(self) -> None:
        """Every invariant of the rows and the pool, and every cached token in its place."""
        holders: Counter[int] = Counter()
        for manager in self.all_managers:
            for request_id, row in manager.req_to_blocks.items():
                if manager in self.managers:
                    num_null = manager.num_null_blocks.get(request_id, 0)
                    nulls = [block.is_null for block in row]
                    assert nulls == [i < num_null for i in range(len(row))]
                holders.update(block.block_id for block in row if not block.is_null)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == holders[block.block_id], block
        assert self.pool.get_num_free_blocks() + len(holders) == self.pool.num_gpu_blocks - 1
        for request_id, live in self.live.items():
            for group, cached in enumerate(live.of_group):
                assert self.read(request_id, group) == cached
            if len(self.all_managers) > len(self.managers):
                self._check_window(live)
            self._check_own_bound(request_id)

    def _check_window(self, live: Live) -> None:
        """The layers with a sliding window find their last tokens."""
        row = self.all_managers[-1].req_to_blocks[live.request.request_id]
        end, group = live.request.num_computed_tokens, len(self.managers)
        for position in range(max(0, end - SLIDING_WINDOW + 1), end):
            place = row[position // self.block_size].block_id, position % self.block_size
            assert self.memory[place] == self._token(live.request, position, group)

    def _check_own_bound(self, request_id: str) -> None:
        """No round where none was wanted, and no more blocks than the request's budget asks."""
        num_null = self.manager.num_null_blocks.get(request_id, 0)
        policy = self.manager.policy_of(request_id)
        if policy is None:
            assert num_null == 0
        elif self.pressure is None and not self.manager.num_deferred_rounds:
            most = self.manager.kv_cache_spec.max_blocks_per_request(policy)
            num_held = len(self.manager.req_to_blocks[request_id]) - num_null
            # A prefix hit may be longer, until the request is scheduled again.
            with_hits = -(-(self.live[request_id].num_hits + self.max_batched) // self.block_size)
            assert most is None or num_held <= max(most, with_hits)

    def read(self, request_id: str, group: int = 0) -> list[Token]:
        """The request's cached tokens, as attention would read them behind the null head."""
        row = self.managers[group].req_to_blocks[request_id]
        num_null = self.managers[group].num_null_blocks.get(request_id, 0)
        num_tokens = self.live[request_id].request.num_computed_tokens
        return [
            self.memory[row[i // self.block_size].block_id, i % self.block_size]
            for i in range(num_null * self.block_size, num_tokens)
        ]
