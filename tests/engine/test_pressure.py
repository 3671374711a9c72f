"""Rounds that wait for a full pool: nothing is lost before, and nothing is preempted after."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_judge import FLOAT32_ERROR
from dense_reference import DenseReference
from dense_replay import Step
from engine_runs import (
    SMALL,
    EngineRun,
    ModelFolder,
    assert_pool_is_as_at_the_start,
    largest_error,
    random_prompt,
    replayed,
    run_engine,
)
from pool_world import IN_WORLD, PoolWorld

from triattention_vllm.config import Settings

POOL = {"max_model_len": 512, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 40}
"""39 blocks of 32 tokens; six requests of 280 tokens need 54, compressed ones at most 36."""
PROMPTS = [random_prompt(30, seed) for seed in range(6)]
UNDER_PRESSURE = replace(IN_WORLD, when="pressure")


@pytest.fixture(scope="module")
def full_pool(model_folder: ModelFolder, text: str) -> Callable[..., EngineRun]:
    """The same six requests in the same small pool."""

    def run(settings: dict[str, Any] | None, **engine: Any) -> EngineRun:
        chosen = None if settings is None else {**settings, "calibration_text": text}
        return run_engine(model_folder("qwen3"), PROMPTS, 250, chosen, **{**POOL, **engine})

    return run


def round_moments(run: EngineRun) -> list[tuple[int, int]]:
    """(tokens computed before the step, null blocks after it) of a lone request's round steps."""
    (request,) = run.requests
    nulls = [null for rows in run.steps for _, null, _ in rows.values()]
    before = [0, *nulls]
    pairs = zip(request.starts, before, nulls, strict=False)
    return [(start, now) for start, old, now in pairs if now > old]


def test_a_full_server_compresses_before_it_preempts(
    full_pool: Callable[..., EngineRun],
) -> None:
    stock = full_pool(None)
    pressed = full_pool({**SMALL, "when": "pressure"})
    ahead = full_pool({**SMALL, "when": "pressure"}, async_scheduling=True)
    assert stock.num_preemptions > 0
    assert ahead.scheduler == "CompressionAsyncScheduler"
    for one, other in zip(pressed.requests, ahead.requests, strict=True):
        # Pressure is counted in committed tokens, so asynchronous scheduling changes neither whose
        # rounds run, nor their boundaries, nor what the first of them keeps.
        assert one.boundaries == other.boundaries
        assert [*map(torch.equal, one.kept[:1], other.kept[:1])] == [True] * bool(one.kept)
    for run in (pressed, ahead):
        assert run.num_preemptions == 0
        assert [len(request.token_ids) for request in run.requests] == [280] * 6
        assert any(request.kept for request in run.requests)
        assert_pool_is_as_at_the_start(run)


def test_a_request_longer_than_the_pool_grows_to_the_threshold_between_large_rounds(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """Held against the float64 reference, with rounds at the steps at which the engine had them;
    asynchronous scheduling chooses among the same candidates."""
    folder = model_folder("qwen3")
    run, ahead = (
        run_engine(
            folder,
            [random_prompt(100, 3)],
            1000,
            {**SMALL, "when": "pressure", "calibration_text": text},
            async_scheduling=flag,
            **{**POOL, "max_model_len": 4096, "num_gpu_blocks_override": 20},
        )
        for flag in (False, True)
    )
    (request,), (other,) = run.requests, ahead.requests
    assert request.boundaries == other.boundaries
    assert torch.equal(request.kept[0], other.kept[0])
    moments = round_moments(run)
    usable = run.num_blocks - 1
    assert run.num_preemptions == 0
    assert len(moments) == len(request.kept) >= 2
    assert len(request.token_ids) > usable * run.block_size
    first = moments[0][0]
    # More than 90 % of 19 blocks are 18; the token behind the next one begins the last of them.
    assert first == 17 * run.block_size - 1
    assert moments[0][1] * run.block_size >= first - 160 - run.block_size
    starts = {start for start, _ in moments}
    edges = [*request.starts, len(request.token_ids) - 1]
    steps = [Step(start, end, start if start in starts else 0) for start, end in pairwise(edges)]
    result = replayed(run, request, reference(folder), SMALL, steps=steps)
    assert largest_error(request, result.logprobs) < FLOAT32_ERROR


def world_of(
    lengths: Sequence[int], num_blocks: int, settings: Settings = UNDER_PRESSURE
) -> PoolWorld:
    """Requests of these prompt lengths, which share no prefix."""
    world = PoolWorld(settings, 4, num_blocks, max_batched=16)
    for i, length in enumerate(lengths):
        world.add(f"r{i}", [i * 1000 + position for position in range(length)])
    return world


def test_the_longest_requests_are_compressed_first_and_only_as_far_as_needed() -> None:
    """200 blocks: above 180 needed ones the longest request is compressed, which is enough."""
    world = world_of((100, 300, 60), 201)
    while not world.plans:
        world.step()
        world.check_invariants()
    assert [plan.request_id for plan in world.plans] == ["r1"]
    held = 200 - world.pool.get_num_free_blocks()
    assert held <= 160
    for _ in range(20):
        world.step()
    assert len(world.plans) == 1, "between the thresholds no round begins"
    assert world.pressure is not None
    assert not world.pressure.is_on


def test_under_lasting_pressure_rounds_run_as_they_always_do() -> None:
    """With thresholds that any need exceeds, the rounds are those of when="always"."""
    boundaries = []
    for chosen in (
        IN_WORLD,
        replace(UNDER_PRESSURE, pressure_start=1, pressure_stop=0),
    ):
        world = world_of((20, 90, 140), 201, chosen)
        for _ in range(120):
            world.step()
            world.check_invariants()
        boundaries.append(sorted((plan.request_id, plan.nominal_boundary) for plan in world.plans))
    assert boundaries[0] == boundaries[1]
    assert len(boundaries[0]) > 10


def test_a_request_that_is_not_scheduled_in_the_step_is_compressed_too() -> None:
    """A prompt takes all tokens of the step; a request behind it gives blocks nevertheless."""
    world = world_of((150,), 61)
    for _ in range(12):
        world.step()
    live = world.live["r0"]
    world.live = {}
    world.add("long", [10**6 + position for position in range(400)])
    world.step()
    world.live["r0"] = live
    while not world.plans:
        computed = live.request.num_computed_tokens
        world.step()
        world.check_invariants()
    assert "r0" in {plan.request_id for plan in world.plans}
    assert live.request.num_computed_tokens == computed
    assert world.num_preemptions == 0


def test_a_session_that_waits_for_its_next_input_is_compressed_too() -> None:
    """Regression: only running requests were. A session that held most of the pool could not be
    preempted, and its next input found no room, for ever."""
    world = world_of((340,), 101)
    while not world.live or world.live["r0"].request.num_computed_tokens < 340:
        world.step()
    assert world.plans == []
    world.park("r0")
    assert world.step() == [], "it holds 86 blocks of 100, below the threshold"
    world.add("beside", [10**6 + position for position in range(30)])
    while not world.plans:
        assert len(world.live) < 2
        world.step()
        world.check_invariants()
    assert {plan.request_id for plan in world.plans} == {"r0"}
    world.unpark("r0", list(range(80)))
    for _ in range(10):
        world.step()
        world.check_invariants()
    assert world.live["r0"].request.num_computed_tokens > 420
    assert world.num_preemptions == 0


@pytest.mark.parametrize("when", ["always", "pressure"])
def test_a_prompt_that_finds_no_room_beside_a_waiting_session_gets_it(when: str) -> None:
    """Regression: the session, below the threshold, kept what nothing else could take, and the
    prompt waited until the session's next input. Where rounds do not wait, a session that ended
    its turn in the step of its prefix hit kept all of it."""
    settings = replace(IN_WORLD, when=when, max_request_budget=400)
    world = PoolWorld(settings, 4, 101, max_batched=16)
    world.add("off", list(range(300)), max_tokens=20, extra_args={"kv_compression": "off"})
    while not world.live or world.live["off"].request.num_computed_tokens < 300:
        world.step()
    world.park("off")
    assert world.plans == []
    params = world.requests["off"].sampling_params
    assert params is not None
    params.extra_args = None
    world.add("beside", [10**6 + position for position in range(150)])
    for _ in range(20):
        world.step()
        world.check_invariants()
    assert {plan.request_id for plan in world.plans} >= {"off"}
    assert world.live["beside"].request.num_computed_tokens > 150


def test_a_session_is_compressed_for_nobody_who_found_no_room() -> None:
    """Regression: it was, for a request that was gone by the next step, and for one that waited
    for something else than memory, such as a slot or the end of a pause."""
    settings = replace(IN_WORLD, when="pressure", max_request_budget=400)
    world = PoolWorld(settings, 4, 101, max_batched=16)
    world.add("off", list(range(300)), max_tokens=20, extra_args={"kv_compression": "off"})
    while not world.live or world.live["off"].request.num_computed_tokens < 300:
        world.step()
    world.park("off")
    params = world.requests["off"].sampling_params
    assert params is not None
    params.extra_args = None
    other = [10**6 + position for position in range(150)]
    world.add("gone", other, max_tokens=20, extra_args={"kv_compression": "off"})
    assert world.step() == []
    assert world.without_room.are_stuck(world.requests)
    del world.requests[world.waiting.pop().request.request_id]
    world.add("slotless", [10**7 + position for position in range(20)])
    waiting, world.waiting = world.waiting, []
    for _ in range(3):
        assert not world.without_room.are_stuck(world.requests)
        assert world.step() == []
    world.waiting = waiting
    world.step()
    assert world.live.keys() == {"slotless"}
    assert world.plans == []
