"""Laws of rows, blocks and the pool, held after every step inside the engine of a soak.

vLLM loads ``install`` as a general plugin in every process of the server. A law that is broken
raises AssertionError there, which ends the server: a soak that ends well broke none.
"""

import json
import os
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from soak_memory import FOLDER

_STEPS_BETWEEN_REPORTS = 200


def install() -> None:
    """Put the checks around the scheduler and the worker of KV compression, once."""
    from triattention_vllm.engine.scheduler import CompressionScheduler
    from triattention_vllm.engine.worker import CompressionWorker

    if "soak_is_installed" in vars(CompressionScheduler):
        return
    CompressionScheduler.soak_is_installed = True
    _watch_scheduler(CompressionScheduler)
    _watch_worker(CompressionWorker)


def _watch_scheduler(scheduler_class: Any) -> None:
    made, schedule = scheduler_class.__init__, scheduler_class.schedule

    @wraps(made)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.soak = SchedulerChecks(self)

    @wraps(schedule)
    def checked_schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.soak.begin_step()
        output = schedule(self, *args, **kwargs)
        self.soak.end_step(output)
        return output

    def then_checked(name: str) -> None:
        """Check the pool behind whatever else changes it."""
        original = getattr(scheduler_class, name)

        @wraps(original)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            self.soak.check_pool()
            return result

        setattr(scheduler_class, name, checked)

    scheduler_class.__init__, scheduler_class.schedule = checked_init, checked_schedule
    for name in ("update_from_output", "finish_requests", "reset_prefix_cache"):
        then_checked(name)


class SchedulerChecks:
    """The scheduler's side: who holds which block, and which may be written."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        (self.manager,) = scheduler.compressed_managers
        self.size = self.manager.block_size
        self.counts = Counter(
            dict.fromkeys(("steps", "rounds", "preemptions", "deferred", "idle"), 0)
        )
        self.evicted: set[int] = set()
        self._watch_evictions()

    def _watch_evictions(self) -> None:
        original = self.pool._maybe_evict_cached_block

        def evict(block: Any) -> bool:
            self.evicted.add(block.block_id)
            return bool(original(block))

        self.pool._maybe_evict_cached_block = evict

    def begin_step(self) -> None:
        """Remember what has a prefix-cache hash before the step."""
        self.evicted.clear()
        self.hashed = self._hashed()
        self.num_deferred = self.manager.num_deferred_rounds

    def _hashed(self) -> dict[int, Any]:
        return {b.block_id: b.block_hash for b in self.pool.blocks if b.block_hash is not None}

    def end_step(self, output: Any) -> None:
        """Every law, and a note for the worker, which holds its own side against it."""
        holders = self.check_pool()
        plans = vars(output).get("round_plans", ())
        written = self._written(output)
        for plan in plans:
            row = self._row(plan.request_id)[plan.row_start :]
            assert tuple(row[: len(plan.row_blocks)]) == plan.row_blocks, plan
            for block_id in plan.destination_blocks:
                block = self.pool.blocks[block_id]
                assert (block.ref_cnt, block.block_hash) == (1, None), (plan, block)
                assert holders[block_id] == 1, (plan, block)
        targets = written.union(*(plan.destination_blocks for plan in plans))
        overwritten = (targets & self.hashed.keys()) - self.evicted
        assert not overwritten, f"blocks {overwritten} are in the prefix cache and are written"
        admitted = {new.req_id for new in output.scheduled_new_reqs}
        admitted |= output.scheduled_cached_reqs.resumed_req_ids
        due = output.num_scheduled_tokens.keys() - admitted
        for request in self.scheduler.running:
            self._check_bound(request, request.request_id in due)
        rows = {name: tuple(self._row(name)) for name in output.num_scheduled_tokens}
        output.soak = {"rows": rows, "hashed": self._hashed(), "new": targets | self.evicted}
        self.counts["steps"] += 1
        self.counts["rounds"] += len(plans)
        self.counts["preemptions"] += len(output.preempted_req_ids or ())
        self.counts["deferred"] = self.manager.num_deferred_rounds
        if self.counts["steps"] % _STEPS_BETWEEN_REPORTS == 0:
            self._report()

    def _row(self, request_id: str) -> list[int]:
        return [block.block_id for block in self.manager.req_to_blocks[request_id]]

    def _written(self, output: Any) -> set[int]:
        """Blocks that take this step's tokens; none of them may be a null block."""
        written: set[int] = set()
        for request_id, num_new in output.num_scheduled_tokens.items():
            end = self.scheduler.requests[request_id].num_computed_tokens
            row = self._row(request_id)[(end - num_new) // self.size : -(-end // self.size)]
            assert 0 not in row, f"{request_id} writes into the null block: {row}"
            written.update(row)
        return written

    def _check_bound(self, request: Any, had_its_turn: bool) -> None:
        """Behind its round a request holds what its own policy promises. A round that is due still
        had to wait: for private blocks, or because its request was admitted with a long prefix hit
        just now, or not scheduled."""
        from triattention_vllm.engine.pressure import num_committed

        name = request.request_id
        policy = self.manager.policy_of(name)
        num_null = self.manager.num_null_blocks.get(name, 0)
        if policy is None:
            assert num_null == 0, f"{name} asked not to be compressed"
            return
        num_evicted, committed = num_null * self.size, num_committed(request)
        if policy.due_round(committed, num_evicted, request.num_prompt_tokens) is not None:
            waited = self.manager.num_deferred_rounds > self.num_deferred
            assert waited or not had_its_turn, f"{name} missed its round"
            return
        num_held = len(self.manager.req_to_blocks[name]) - num_null
        promised = self.manager.kv_cache_spec.max_blocks_per_request(policy)
        assert num_held <= promised, f"{name} holds {num_held} blocks, {promised} are promised"

    def check_pool(self) -> Counter[int]:
        """References, the free list and the rows agree; returns how many rows hold each block."""
        holders: Counter[int] = Counter()
        for request_id, row in self.manager.req_to_blocks.items():
            num_null = self.manager.num_null_blocks.get(request_id, 0)
            nulls = [block.is_null for block in row]
            assert nulls == [i < num_null for i in range(len(row))], f"{request_id}: {nulls}"
            own = {block.block_id for block in row[num_null:]}
            assert len(own) == len(row) - num_null, f"{request_id} holds a block twice"
            holders.update(own)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == holders[block.block_id], (block, holders[block.block_id])
            assert block.ref_cnt < 2 or block.block_hash is not None, f"{block} has two owners"
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        assert free == set(range(1, self.pool.num_gpu_blocks)) - holders.keys()
        assert len(free) == self.pool.get_num_free_blocks()
        if not self.scheduler.requests:
            self._check_idle()
        return holders

    def _check_idle(self) -> None:
        """Without requests the pool is as at the start."""
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not self.manager.num_null_blocks
        assert not self.manager.pending_plans
        assert not any(self.manager.req_to_blocks.values())
        self.counts["idle"] += 1
        self._report()

    def _report(self) -> None:
        path = Path(os.environ[FOLDER], "scheduler.json")
        is_idle = not self.scheduler.requests
        more = {"is_idle": is_idle, "scheduler": type(self.scheduler).__name__}
        _write(path, {**self.counts, **more, "num_free": self.pool.get_num_free_blocks()})


def _watch_worker(worker_class: Any) -> None:
    original = worker_class.execute_model

    @wraps(original)
    def execute_model(self: Any, output: Any) -> Any:
        result = original(self, output)
        if "soak" in vars(output):
            if "soak" not in vars(self):
                self.soak = WorkerChecks(self)
            self.soak.end_step(output)
        return result

    worker_class.execute_model = execute_model


class WorkerChecks:
    """The worker's side: its rows are the scheduler's, and hashed blocks keep their bytes."""

    def __init__(self, worker: Any) -> None:
        self.runner = worker.model_runner
        self.caches = [cache.view(torch.int32) for cache in self.runner.kv_caches]
        self.copies = [cache.clone() for cache in self.caches]
        self.known: dict[int, Any] = {}
        self.counts = Counter({"steps": 0, "rows": 0, "hashed_blocks": 0})

    def end_step(self, output: Any) -> None:
        """After the forward pass."""
        note = output.soak
        null_heads = vars(output).get("null_heads", {}).get(0, {})
        for request_id, row in note["rows"].items():
            assert tuple(self.runner.requests[request_id].block_ids[0]) == row, request_id
            idx = self.runner.input_batch.req_id_to_index[request_id]
            table = self.runner.input_batch.block_table[0].block_table.np[idx, : len(row)]
            assert tuple(table.tolist()) == row, request_id
            assert row.count(0) == null_heads.get(request_id, 0), (request_id, row)
        unchanged = [
            block_id
            for block_id, block_hash in note["hashed"].items()
            if self.known.get(block_id) == block_hash and block_id not in note["new"]
        ]
        for cache, copy in zip(self.caches, self.copies, strict=True):
            same = (cache[unchanged] == copy[unchanged]).flatten(1).all(1).tolist()
            changed = [b for b, is_same in zip(unchanged, same, strict=True) if not is_same]
            assert not changed, f"blocks {changed} are in the prefix cache and were changed"
            hashed = list(note["hashed"])
            copy[hashed] = cache[hashed]
        self.known = note["hashed"]
        self.counts["steps"] += 1
        self.counts["rows"] += len(note["rows"])
        self.counts["hashed_blocks"] += len(unchanged)
        if self.counts["steps"] % _STEPS_BETWEEN_REPORTS == 1:
            _write(Path(os.environ[FOLDER], "worker.json"), dict(self.counts))


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content))
    unfinished.rename(path)
