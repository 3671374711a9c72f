"""Rows, blocks and the pool: laws that hold after every step of any traffic."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_world import IN_WORLD, PoolWorld
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from triattention_vllm.request import RequestSettings

Asked = dict[str, object] | None
ASKED: list[Asked] = [
    None,
    {"kv_budget": 30},
    {"kv_budget": 100},
    {"kv_budget": 3},
    {"kv_compression": "off"},
]
"""By its own budget, smaller, larger or one that cannot be served; and without compression."""

operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 150), st.sampled_from(ASKED)),
        st.tuples(st.just("finish"), st.integers(0, 5), st.just(0), st.none()),
        st.tuples(st.just("step"), st.integers(1, 40), st.just(0), st.none()),
    ),
    max_size=25,
)


def prompt_of(kind: int, length: int) -> list[int]:
    """Prompts of one kind share their prefix, so prefix caching finds them."""
    return [(kind * 7919 + position * 31) % 1000 for position in range(length)]


def run_traffic(world: PoolWorld, traffic: list[tuple[str, int, int, Asked]]) -> None:
    num_added = 0
    for what, number, length, asked in traffic:
        if what == "add":
            max_tokens = 70 if asked and "kv_compression" in asked else 1 << 16
            world.add(f"r{num_added}", prompt_of(number, length), max_tokens, asked)
            num_added += 1
        elif what == "finish" and world.live:
            world.finish(list(world.live)[number % len(world.live)])
        else:
            for _ in range(number):
                world.step()
                world.check_invariants()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("when", ["always", "pressure"])
@settings(max_examples=30)
@given(traffic=operations, protect=st.sampled_from(["prompt", "sinks", 3]))
def test_rows_blocks_and_tokens_stay_right_under_any_traffic(
    traffic: list[tuple[str, int, int, Asked]],
    protect: str | int,
    prefix_caching: bool,
    depth: int,
    when: str,
) -> None:
    """Every request by a budget of its own, or none, whether rounds wait for pressure or not."""
    chosen = replace(IN_WORLD, protect=protect, when=when)
    world = PoolWorld(chosen, 4, 64, prefix_caching=prefix_caching, depth=depth, max_batched=16)
    run_traffic(world, traffic)
    for request_id in list(world.live):
        world.finish(request_id)
    world.check_invariants()
    assert world.pool.get_num_free_blocks() == world.pool.num_gpu_blocks - 1
    assert not world.manager.num_null_blocks
    assert not world.manager.pending_plans


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("when", ["always", "pressure"])
@settings(max_examples=20)
@given(traffic=operations)
def test_several_compressed_groups_over_one_memory_stay_right_under_any_traffic(
    traffic: list[tuple[str, int, int, Asked]], depth: int, when: str
) -> None:
    world = PoolWorld(
        replace(IN_WORLD, when=when), 4, 192, depth=depth, max_batched=16, num_groups=2
    )
    run_traffic(world, traffic)
    for request_id in list(world.live):
        world.finish(request_id)
    world.check_invariants()
    assert world.pool.get_num_free_blocks() == world.pool.num_gpu_blocks - 1
    assert not any(manager.num_null_blocks for manager in world.managers)
    assert not world.manager.pending_plans


def test_a_block_that_one_group_frees_is_read_before_a_later_plan_of_another_writes_it() -> None:
    """Regression: plans ran group by group. A later request's first round took the block that an
    earlier request's round had freed in the second group, and wrote it before it was read."""
    chosen = replace(IN_WORLD, interval=16)
    world = PoolWorld(chosen, 4, 300, max_batched=64, num_groups=2)
    world.add("earlier", prompt_of(0, 44))
    world.add("later", prompt_of(1, 12))
    num_handed_over = 0
    for _ in range(60):
        plans = world.step()
        world.check_invariants()
        num_handed_over += sum(
            earlier.group_id > later.group_id
            and not set(earlier.source_blocks).isdisjoint(later.destination_blocks)
            for earlier, later in itertools.combinations(plans, 2)
        )
    assert num_handed_over > 0


def test_freed_blocks_are_evicted_tokens_over_block_size() -> None:
    world = PoolWorld(IN_WORLD, 4, 200)
    for i, length in enumerate((5, 30, 90)):
        world.add(f"r{i}", prompt_of(i, length))
    for _ in range(150):
        world.step()
    world.check_invariants()
    assert len(world.plans) > 10
    for request_id in world.live:
        freed = sum(p.num_freed_blocks for p in world.plans if p.request_id == request_id)
        assert freed == world.manager.num_null_blocks[request_id]
        row = world.manager.req_to_blocks[request_id]
        num_tokens = world.live[request_id].request.num_computed_tokens
        cached = len(world.live[request_id].cached)
        assert freed * 4 == num_tokens - cached
        assert sum(not block.is_null for block in row) == -(-cached // 4)


def test_a_request_never_holds_more_blocks_than_its_spec_promises() -> None:
    world = PoolWorld(IN_WORLD, 4, 400, max_batched=32)
    promised = world.manager.kv_cache_spec.max_blocks_per_request(world.manager.policy)
    world.add("long prompt", prompt_of(0, 900))
    world.add("short prompt", prompt_of(1, 3))
    most = 0
    for _ in range(200):
        world.step()
        for row in world.manager.req_to_blocks.values():
            most = max(most, sum(not block.is_null for block in row))
    world.check_invariants()
    assert promised is not None
    assert most <= promised < 900 // 4


def test_hashed_and_shared_blocks_are_never_written() -> None:
    """Regression: prefix-cache corruption by rewriting blocks whose hash stays registered."""
    world = PoolWorld(IN_WORLD, 4, 300)
    for i in range(4):
        world.add(f"r{i}", prompt_of(0, 40))
    for _ in range(120):
        before = {
            block.block_id: (block.block_hash, block.ref_cnt)
            for block in world.pool.blocks
            if block.block_hash is not None or block.ref_cnt > 1
        }
        hashed = {
            block_id: [world.memory.get((block_id, slot)) for slot in range(4)]
            for block_id in before
        }
        for plan in world.step():
            for block_id in plan.destination_blocks:
                block = world.pool.blocks[block_id]
                assert block.block_hash is None
                assert block.ref_cnt == 1
        for block_id, content in hashed.items():
            block = world.pool.blocks[block_id]
            if block.block_hash is not None and block.block_hash == before[block_id][0]:
                assert content == [world.memory.get((block_id, slot)) for slot in range(4)]
        world.check_invariants()
    assert world.plans


def test_a_prefix_hit_after_compression_reads_the_original_tokens() -> None:
    world = PoolWorld(IN_WORLD, 4, 300)
    world.add("first", prompt_of(0, 24))
    for _ in range(100):
        world.step()
    assert world.live["first"].num_rounds > 3
    world.add("second", prompt_of(0, 24))
    world.step()
    assert world.live["second"].request.num_computed_tokens == 24
    world.check_invariants()
    assert world.live["second"].cached == world.read("first")[:24]


def test_no_hash_is_registered_for_blocks_behind_a_round() -> None:
    world = PoolWorld(IN_WORLD, 4, 300)
    world.add("r", prompt_of(0, 24))
    while not world.plans:
        world.step()
    hashed = {b.block_id for b in world.pool.blocks if b.block_hash is not None}
    for _ in range(60):
        world.step()
    assert len(world.plans) > 3
    assert {b.block_id for b in world.pool.blocks if b.block_hash is not None} <= hashed


def test_protected_prompt_blocks_stay_shared_between_compressed_requests() -> None:
    world = PoolWorld(IN_WORLD, 4, 300)
    world.add("a", prompt_of(0, 21))
    world.step()
    world.add("b", prompt_of(0, 21))
    for _ in range(120):
        world.step()
    rows = [world.manager.req_to_blocks[r] for r in ("a", "b")]
    nulls = [world.manager.num_null_blocks[r] for r in ("a", "b")]
    prefixes = [row[null : null + 5] for row, null in zip(rows, nulls, strict=True)]
    assert min(nulls) > 3
    assert prefixes[0] == prefixes[1]
    assert all(block.ref_cnt == 2 for block in prefixes[0])


def test_null_heads_are_no_common_prefix() -> None:
    """vLLM asks through 0.31, to read a prefix that all requests share only once."""
    world = PoolWorld(IN_WORLD, 4, 300)
    for request_id, seed in (("a", 0), ("b", 1)):
        world.add(request_id, prompt_of(seed, 21))
    for _ in range(120):
        world.step()
    assert min(world.manager.num_null_blocks.values()) > 3
    assert [world.manager.get_num_common_prefix_blocks(r) for r in ("a", "b")] == [0, 0]


@pytest.mark.parametrize("vllm_trims", [False, True])
def test_every_block_comes_back_whether_or_not_vllm_leaves_out_the_null_head(
    vllm_trims: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 does, which cannot run here: its ``trim_null_head`` stands in for it."""
    own = FullAttentionManager.pop_blocks_for_free

    def trimmed(manager: FullAttentionManager, request_id: str) -> list[KVCacheBlock]:
        blocks = own(manager, request_id)
        return list(itertools.dropwhile(lambda block: block.is_null, blocks))

    if vllm_trims:
        monkeypatch.setattr(FullAttentionManager, "pop_blocks_for_free", trimmed)
    world = PoolWorld(IN_WORLD, 4, 300)
    num_free = world.pool.get_num_free_blocks()
    world.add("a", prompt_of(0, 21))
    for _ in range(120):
        world.step()
    assert world.manager.num_null_blocks["a"] > 3
    world.settle()
    world.finish("a")
    assert world.pool.get_num_free_blocks() == num_free
    assert all(block.ref_cnt == 0 for block in world.pool.blocks[1:])


def test_a_preempted_request_starts_from_zero_and_is_compressed_again() -> None:
    """Regression: a stale offset of a preempted request led to negative slots."""
    world = PoolWorld(IN_WORLD, 4, 26, prefix_caching=False)
    world.add("a", prompt_of(0, 10))
    world.add("b", prompt_of(1, 10))
    for _ in range(160):
        world.step()
        world.check_invariants()
    assert world.num_preemptions > 0
    assert all(live.num_rounds > 0 for live in world.live.values())


def test_a_round_waits_when_the_pool_cannot_give_private_blocks() -> None:
    """Two requests share every candidate and few blocks are free: both go on, uncompressed."""
    chosen = replace(IN_WORLD, protect="sinks")
    world = PoolWorld(chosen, 4, 21)
    world.add("a", prompt_of(0, 53))
    world.step()
    world.add("b", prompt_of(0, 53))
    for _ in range(9):
        world.step()
        world.check_invariants()
    assert world.manager.num_deferred_rounds > 0
    assert not world.plans
    assert all(live.request.num_computed_tokens > 56 for live in world.live.values())
    world.finish("b")
    world.step()
    world.check_invariants()
    assert [plan.request_id for plan in world.plans] == ["a"]


def test_below_the_trigger_the_manager_does_nothing() -> None:
    world = PoolWorld(IN_WORLD, 4, 100)
    world.add("r", prompt_of(0, 20))
    for _ in range(36):
        world.step()
    assert world.live["r"].request.num_computed_tokens == 55
    assert not world.plans
    assert not world.manager.num_null_blocks
    world.step()
    world.step()
    assert len(world.plans) == 1


def test_the_plan_of_a_request_that_the_same_step_preempts_is_dropped() -> None:
    world = PoolWorld(IN_WORLD, 4, 200)
    world.add("r", prompt_of(0, 20))
    while world.live.get("r") is None or world.live["r"].request.num_computed_tokens < 56:
        world.step()
    world.settle()
    world.kv.allocate_slots(world.live["r"].request, 1)
    assert ("r", 0) in world.manager.pending_plans
    world.finish("r")
    assert world.manager.take_plans() == []
    world.check_invariants()


@pytest.mark.parametrize(("num_groups", "num_blocks"), [(1, 25), (2, 41), (3, 57)])
def test_a_prompt_does_not_wait_for_the_room_that_its_own_hit_takes(
    num_groups: int, num_blocks: int
) -> None:
    """Each prompt goes on where the last one ended and is computed in one step, so no round ever
    frees anything and the hit grows until it fills a pool that is smaller than the prompt.
    Regression: with several groups, which all hold the hit, it waited for ever."""
    world = PoolWorld(IN_WORLD, 4, num_blocks, max_batched=8, num_groups=num_groups)
    longest_hit = 0
    for length in range(9, 160, 4):
        world.add(f"turn {length}", prompt_of(0, length))
        for _ in range(20):
            world.step()
            world.check_invariants()
            live = world.live.get(f"turn {length}")
            if live is not None and live.request.num_computed_tokens >= length:
                break
        assert live is not None, f"the prompt of {length} tokens waits in an empty pool"
        longest_hit = max(longest_hit, live.num_hits)
        world.finish(f"turn {length}")
    assert longest_hit >= IN_WORLD.budget


def test_a_hit_of_blocks_that_others_hold_is_taken_whole() -> None:
    """Regression: in a busy pool it was cut, so that requests with a common prompt each computed
    most of it again, and filled the pool until rounds began."""
    world = PoolWorld(replace(IN_WORLD, when="pressure"), 4, 64, max_batched=16)
    world.add("first", prompt_of(0, 120), max_tokens=20)
    while not world.live or world.live["first"].request.num_computed_tokens < 120:
        world.step()
    for name in ("second", "third"):
        world.add(name, prompt_of(0, 120), max_tokens=20)
        world.step()
        world.check_invariants()
        assert world.live[name].num_hits == 116
    assert world.pool.get_num_free_blocks() > 25
    assert world.plans == []


@pytest.mark.parametrize(
    ("asked", "num_hits"), [(None, 88), ({"kv_budget": 100}, 96), ({"kv_compression": "off"}, 96)]
)
def test_a_hit_is_cut_to_what_its_own_request_is_promised(asked: Asked, num_hits: int) -> None:
    """Regression: one with a larger budget, or without compression, computed again what it found
    and had room for."""
    world = PoolWorld(replace(IN_WORLD, max_request_budget=140), 4, 37, max_batched=8)
    world.add("first", prompt_of(0, 100), max_tokens=1, extra_args={"kv_compression": "off"})
    while world.requests:
        world.step()
    world.add("beside", prompt_of(1, 38), max_tokens=20)
    while not world.live or world.live["beside"].request.num_computed_tokens < 38:
        world.step()
    world.add("own", prompt_of(0, 100), max_tokens=8, extra_args=asked)
    world.step()
    world.check_invariants()
    assert world.live["own"].num_hits == num_hits


def test_what_a_request_asks_for_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: it was parsed several times a step."""
    parsed: list[object] = []
    original = RequestSettings.from_extra_args

    def counted(extra_args: Mapping[str, object]) -> RequestSettings:
        parsed.append(extra_args)
        return original(extra_args)

    monkeypatch.setattr(RequestSettings, "from_extra_args", counted)
    world = PoolWorld(IN_WORLD, 4, 64)
    world.add("own", prompt_of(0, 40), extra_args={"kv_budget": 64})
    at_arrival = len(parsed)
    for _ in range(60):
        world.step()
    world.check_invariants()
    assert world.live["own"].num_rounds > 2
    assert len(parsed) == at_arrival + 1
    params = world.requests["own"].sampling_params
    assert params is not None
    params.extra_args = {"kv_compression": "off"}
    assert world.manager.policy_of("own") is None
    world.finish("own")
    assert world.manager._own_policies == {}
