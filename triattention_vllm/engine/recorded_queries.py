"""The last queries of every running request, for scorers that look at them.

Queries are seen where our attention implementations receive them, after RoPE at their real
positions. A request's query at position p lies in row ``p % capacity`` of its ring, so a position
that is computed again, after preemption, replaces what was seen of it before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triattention_kernels.host_copy import on_device
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput

from triattention_vllm.errors import SeamError

IN_FLIGHT = 16
"""Positions that may be computed behind the tokens at which a round was decided, besides those of
an interval: steps are scheduled ahead of the tokens that they compute."""


class RecordedQueries:
    """Rings of queries of one KV-cache group's layers on this rank.

    num_queries: that a scorer wants before ``N*``; interval: by how much later than ``N*`` a round
    may be decided. Memory: ``L * H * D`` numbers for each of ``num_queries + interval + 16``
    positions of each running request, outside of vLLM's own budget.
    """

    def __init__(self, layers: Sequence[Attention], num_queries: int, interval: int) -> None:
        self.num_queries = num_queries
        self._capacity = num_queries + interval + IN_FLIGHT
        self._layers = {layer.layer_name: row for row, layer in enumerate(layers)}
        self._slots: dict[str, int] = {}
        self._positions: dict[str, tuple[int, int]] = {}  # recorded: from, and below
        self._starts: dict[str, int] = {}
        self._num_tokens: dict[str, int] = {}
        self._unseen: set[str] = set()
        self._rings: Tensor | None = None  # [L, slots, capacity, H, D]
        self._sources = self._destinations = torch.empty(0, dtype=torch.int64)

    def begin_step(self, step: SchedulerOutput | None) -> None:
        """The step that runs next, or None for a batch without requests. Raises SeamError where
        the step before ran and layers did not show its queries."""
        self._check_seen()
        self._starts, self._num_tokens = {}, {}
        self._sources = self._destinations = torch.empty(0, dtype=torch.int64)
        if step is None:
            return
        for request_id in step.finished_req_ids:
            self._positions.pop(request_id, None)
            self._slots.pop(request_id, None)
        cached = step.scheduled_cached_reqs
        self._starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        self._num_tokens = step.num_scheduled_tokens
        # A preempted request starts again, or behind a prefix-cache hit, which may be as long as
        # all that it had computed.
        begun = {new.req_id for new in step.scheduled_new_reqs} | cached.resumed_req_ids
        for request_id, num_tokens in self._num_tokens.items():
            start = self._starts[request_id]
            first = start if request_id in begun else self._positions[request_id][0]
            self._positions[request_id] = (first, start + num_tokens)

    def read_rows(self, requests: Sequence[str], device: torch.device) -> None:
        """Where each query of the step goes. requests: in the order of the batch."""
        sources: list[int] = []
        destinations: list[int] = []
        first = 0
        for request_id in requests:
            num_tokens = self._num_tokens.get(request_id, 0)
            if num_tokens:
                end = self._starts[request_id] + num_tokens
                num_kept = min(num_tokens, self._capacity)
                base = self._slot(request_id) * self._capacity
                sources += range(first + num_tokens - num_kept, first + num_tokens)
                destinations += (base + p % self._capacity for p in range(end - num_kept, end))
            first += num_tokens
        if sources:
            self._unseen = set(self._layers)
        self._sources = on_device(sources, torch.int64, device)
        self._destinations = on_device(destinations, torch.int64, device)

    def observe(self, layer_name: str, query: Tensor) -> None:
        """Keep what is wanted of a layer's queries [n, H, D] of this step."""
        self._unseen.discard(layer_name)
        if not len(self._sources):
            return
        rings = self._grown(query)[self._layers[layer_name]]
        rings.flatten(0, 1).index_copy_(0, self._destinations, query[self._sources])

    def before(self, request_id: str, boundary: int) -> Tensor:
        """The last queries before position ``boundary``, [L, n, H, D], n at most ``num_queries``.

        Behind a prefix-cache hit, whose tokens nothing computed, the first queries that were seen
        take the place of those that were not. Raises SeamError where none was seen.
        """
        self._check_seen()
        start, end = self._positions.get(request_id, (0, 0))
        first = max(boundary - self.num_queries, start, end - self._capacity)
        last = min(first + self.num_queries, end)
        if self._rings is None or last <= first:
            raise SeamError(
                f"no query of request {request_id} was seen before its round at {boundary} tokens; "
                "this vLLM version is not supported with methods that look at queries"
            )
        own = self._rings[:, self._slots[request_id]]
        places = [position % self._capacity for position in range(first, last)]
        return own[:, on_device(places, torch.int64, own.device)]

    def _check_seen(self) -> None:
        if self._unseen:
            raise SeamError(
                f"a step ran and attention layers did not show its queries: {sorted(self._unseen)}."
                " If cudagraph_mode is FULL, set it to PIECEWISE; otherwise this vLLM version is "
                "not supported with methods that look at queries"
            )

    def _slot(self, request_id: str) -> int:
        if request_id not in self._slots:
            taken = set(self._slots.values())
            self._slots[request_id] = min(set(range(len(taken) + 1)) - taken)
        return self._slots[request_id]

    def _grown(self, query: Tensor) -> Tensor:
        """The rings, with room for as many requests as have a slot."""
        num_slots = 0 if self._rings is None else self._rings.shape[1]
        needed = 1 + max(self._slots.values())
        if self._rings is None or num_slots < needed:
            size = (len(self._layers), max(needed, 2 * num_slots), self._capacity, *query.shape[1:])
            grown = query.new_empty(size)
            if self._rings is not None:
                grown[:, :num_slots] = self._rings
            self._rings = grown
        return self._rings
