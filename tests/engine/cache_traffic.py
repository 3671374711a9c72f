"""Traffic for the prefix cache and for a pool that is too small, and what was seen of both."""

import time
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash


class EventMirror:
    """A subscriber of vLLM's KV events that keeps what it was told: block hash -> its tokens from
    the start of the sequence on."""

    def __init__(self, engine: Any, endpoint: str) -> None:
        self.blocks: dict[Any, tuple[int, ...]] = {}
        self.num_removed = self.num_cleared = 0
        self._pool = engine.observer.pool
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.subscribe("")
        deadline = time.monotonic() + 30
        while not self.num_cleared and time.monotonic() < deadline:
            # A subscriber misses what was sent before it was connected, so begin with nothing.
            assert engine.llm.reset_prefix_cache()
            engine.generate([[1, 2, 3]], 1)
            self.read()
        assert self.num_cleared, "no event arrived"

    def read(self, patience: float = 0.2) -> None:
        """Take in every event that has been sent."""
        while self._socket.poll(patience * 1000):
            batch = self._decoder.decode(self._socket.recv_multipart()[-1])
            for event in batch.events:
                self._apply(event)

    def _apply(self, event: Any) -> None:
        if isinstance(event, AllBlocksCleared):
            self.num_cleared += 1
            self.blocks.clear()
        elif isinstance(event, BlockRemoved):
            self.num_removed += len(event.block_hashes)
            for block_hash in event.block_hashes:
                del self.blocks[block_hash]
        elif isinstance(event, BlockStored):
            tokens = self.blocks.get(event.parent_block_hash, ())
            for i, block_hash in enumerate(event.block_hashes):
                size = event.block_size
                tokens += tuple(event.token_ids[i * size : (i + 1) * size])
                self.blocks[block_hash] = tokens

    def missing_and_wrong(self) -> tuple[set[Any], set[Any]]:
        """Hashes that the pool has and the mirror does not, and the other way round."""
        hashes = [block.block_hash for block in self._pool.blocks if block.block_hash is not None]
        known = {maybe_convert_block_hash(get_block_hash(block_hash)) for block_hash in hashes}
        return known - set(self.blocks), set(self.blocks) - known


def conversation(engine: Any, job: dict[str, Any]) -> list[Any]:
    """A chat whose every turn sends all earlier prompts and answers again."""
    history: list[int] = list(job["system_prompt"])
    for message in job["messages"]:
        history += message
        (output,) = engine.generate([history], job["turn_tokens"])
        history += output.outputs[0].token_ids
    return list(engine.observer.take())


def cache_traffic(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Shared prompts, a reset and an eviction, with a subscriber to the events all the while."""
    observer, manager = engine.observer, engine.observer.manager
    mirror = EventMirror(engine, job["events"])
    observer.take()
    result: dict[str, Any] = {"differences": []}

    def compare() -> None:
        mirror.read()
        result["differences"].append(mirror.missing_and_wrong())

    prompt = job["shared_prompt"]
    engine.generate([prompt], 1)
    add(engine, {f"shared {i}": prompt for i in range(4)}, 150)
    step_until(engine, lambda: len(manager.num_null_blocks) == 4)
    # vLLM computes the last token of a prompt again, so its block is each request's own.
    num_protected = (len(prompt) - 1) // observer.block_size
    rows = [
        row[manager.num_null_blocks[request_id] :][:num_protected]
        for request_id, row in manager.req_to_blocks.items()
    ]
    result["protected"] = [[(block.block_id, block.ref_cnt) for block in row] for row in rows]
    result["reset_while_running"] = engine.llm.reset_prefix_cache()
    step_until(engine, lambda: False)
    compare()
    result["shared"] = observer.take()

    result["reset_when_idle"] = engine.llm.reset_prefix_cache()
    engine.generate([prompt], 150)
    compare()
    result["after_reset"] = observer.take()

    for seed_prompt in job["other_prompts"]:
        engine.generate([seed_prompt], 4)
    num_removed = mirror.num_removed
    with small_pool(observer, 12):
        engine.generate([job["other_prompts"][0][::-1]], 60)
    engine.generate([prompt], 150)
    compare()
    result["num_evicted"] = mirror.num_removed - num_removed
    result["after_eviction"] = observer.take()
    result["events"] = mirror.blocks
    return result


def pool_traffic(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Requests of two priorities in a pool that cannot hold them, and one that is aborted."""
    observer = engine.observer
    assert engine.llm.reset_prefix_cache()
    preempted = observer.num_preemptions
    prompts = job["pool_prompts"]
    with small_pool(observer, 17):
        add(engine, {f"low {i}": prompt for i, prompt in enumerate(prompts[:3])}, 200, priority=5)
        step_until(engine, lambda: len(observer.manager.num_null_blocks) == 3)
        add(engine, {f"high {i}": prompt for i, prompt in enumerate(prompts[3:5])}, 200)
        step_until(engine, lambda: False)
    result = {
        "num_preemptions": observer.num_preemptions - preempted,
        "preempted": observer.take(),
    }
    add(engine, {"neighbour": prompts[0]}, 200)
    add(engine, {"aborted": prompts[1]}, 900)
    step_until(engine, lambda: len(observer.manager.num_null_blocks) == 2)
    engine.llm.llm_engine.abort_request(["aborted"])
    step_until(engine, lambda: False)
    result["beside_an_abort"] = observer.take()
    return result


class small_pool:  # noqa: N801
    """Leaves so many free blocks; the others are taken out of vLLM's pool and given back."""

    def __init__(self, observer: Any, num_blocks: int) -> None:
        self._pool = observer.pool
        self._num_taken = self._pool.get_num_free_blocks() - num_blocks

    def __enter__(self) -> None:
        self._taken = self._pool.get_new_blocks(self._num_taken)

    def __exit__(self, *_: object) -> None:
        self._pool.free_blocks(self._taken)


def add(engine: Any, prompts: dict[str, list[int]], num_tokens: int, priority: int = 0) -> None:
    """Queue requests by name, without running them."""
    for name, prompt in prompts.items():
        engine.llm.llm_engine.add_request(
            name, {"prompt_token_ids": prompt}, engine.greedy(num_tokens), priority=priority
        )


def step_until(engine: Any, done: Any) -> None:
    """Step until ``done()``, or until no request is left."""
    while engine.llm.llm_engine.has_unfinished_requests() and not done():
        engine.llm.llm_engine.step()
