"""Requests of one batch, each by a budget of its own or without compression."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dense_reference import DenseReference
from dense_replay import replay, steps_of
from engine_runs import EngineError, ModelFolder, random_prompt, run_engine
from pool_world import PoolWorld
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from triattention_vllm.config import Settings
from triattention_vllm.engine.requests import engine_capacity, refuse_request
from triattention_vllm.method.statistics import Statistics

SMALL = Settings(budget=48, interval=8, window=8, sink_tokens=2)


def api_config(**changes: Any) -> Any:
    """The parts of an API process' configuration that a request is held against."""
    parallel = {
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "data_parallel_rank_local": None,
        "local_engines_only": False,
    }
    return SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=changes.pop("num_gpu_blocks", 256)),
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(**{**parallel, **changes}),
        additional_config={"kv_compression": SMALL.to_mapping()},
        max_in_flight_tokens=64,
        num_lookahead_tokens=0,
    )


@pytest.mark.parametrize(
    ("changes", "num_blocks"),
    [
        ({}, 255),
        ({"data_parallel_size": 2}, 127),
        ({"data_parallel_size": 2, "data_parallel_rank_local": 1}, 255),
        (
            {"data_parallel_size": 4, "data_parallel_size_local": 2, "local_engines_only": True},
            127,
        ),
    ],
)
def test_the_pool_of_one_engine_is_what_a_request_can_have(
    changes: dict[str, Any], num_blocks: int
) -> None:
    config = api_config(**changes)
    config.cache_config.block_size = 16
    capacity = engine_capacity(config)
    assert capacity is not None
    assert capacity.num_blocks == num_blocks
    assert engine_capacity(api_config(num_gpu_blocks=None)) is None


def test_values_are_looked_at_before_the_pool_or_the_prompt_is_known() -> None:
    config = api_config(num_gpu_blocks=None)
    refuse_request(config, SamplingParams(extra_args={"kv_budget": 10**6}), 10)
    with pytest.raises(VLLMValidationError, match="kv_budget is 'x'.*parameter=kv_budget"):
        refuse_request(config, SamplingParams(extra_args={"kv_budget": "x"}), None)
    config.additional_config = {}
    refuse_request(config, SamplingParams(extra_args={"kv_budget": "x"}), 10)


def test_a_value_that_reached_the_scheduler_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    world = PoolWorld(SMALL, 4, 64)
    bad: list[dict[str, object]] = [
        {"kv_budget": "x", "kv_transfer_params": 1},
        {"kv_budget": 10**6},
        {"kv_compression": "off", "other": 2},
    ]
    for i, extra_args in enumerate(bad):
        world.add(f"r{i}", list(range(20)), 300, extra_args)
        assert world.manager.policy_of(f"r{i}") is world.manager.policy
    left = [live.request.sampling_params.extra_args for live in world.waiting]
    assert left == [{"kv_transfer_params": 1}, {}, {"other": 2}]
    for _ in range(60):
        world.step()
    assert all(live.num_rounds for live in world.live.values())
    reasons = ("kv_budget is 'x'", "kv_budget is 1000000, allowed", "keeps all tokens")
    for i, reason in enumerate(reasons):
        assert any(f"Request r{i} is" in line and reason in line for line in caplog.messages)


def test_a_request_is_admitted_by_the_bound_of_its_own_budget() -> None:
    """A prompt of 160 tokens, 40 blocks: by the server's budget of 48 it needs 48 + 8 tokens and
    a chunk, by its own one more, and without compression all of it."""
    world = PoolWorld(SMALL, 4, 101, max_batched=16)
    asked = [None, {"kv_budget": 80}, {"kv_budget": 30}, {"kv_compression": "off"}]
    for i, extra_args in enumerate(asked):
        world.add(f"r{i}", list(range(160)), 10, extra_args)
    needed = [
        world.manager.get_num_blocks_to_allocate(f"r{i}", 160, [], 0, 0, 160, True)
        for i in range(len(asked))
    ]
    assert needed == [72 // 4, 104 // 4, -(-54 // 4), 40]


def test_requests_of_one_batch_each_have_their_own_budget(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """Twice, so that the second time begins with prefix-cache hits; held against the float64
    reference that sees the same tokens, request by request."""
    folder = model_folder("qwen3")
    settings = Settings(budget=128, interval=32, window=16)
    budgets = [None, 256, 112, 0]
    asked = [None, {"kv_budget": 256}, {"kv_budget": 112}, {"kv_compression": "off"}]
    run = run_engine(
        folder,
        [random_prompt(length, length) for length in (40, 90, 33, 70)],
        [250, 300, 200, 330],
        {"budget": 128, "interval": 32, "window": 16, "calibration_text": text},
        extra_args=asked,
        repeat=2,
        max_model_len=1024,
        max_num_batched_tokens=64,
    )
    assert run.statistics is not None
    statistics = Statistics.load(run.statistics.split("kept in ")[-1])
    for request, budget in zip(run.requests, budgets, strict=True):
        own = replace(settings, budget=budget) if budget else settings
        computed = request.token_ids[:-1]
        policy = own.policy(run.block_size)
        if budget == 0:
            policy = replace(policy, budget=1 << 20)
        result = replay(
            reference(folder),
            computed,
            num_prompt=request.num_prompt,
            policy=policy,
            statistics=statistics,
            steps=steps_of(request.starts, len(computed)),
            kept_log=request.kept,
        )
        assert bool(request.kept) == (budget != 0)
        for i, position in enumerate(request.logprobs):
            row = result.logprobs[request.num_prompt - 1 + i]
            for token, logprob in position.items():
                assert logprob == pytest.approx(float(row[token]), abs=1e-4)
    assert run.num_free == run.num_blocks - 1
    assert set(run.ref_counts) == {0}


def test_an_offline_request_that_cannot_be_served_is_refused_with_the_reason(
    model_folder: ModelFolder, text: str
) -> None:
    with pytest.raises(EngineError, match="VLLMValidationError: kv_budget cannot be served: budg"):
        run_engine(
            model_folder("qwen3"),
            [random_prompt(10, 1)],
            10,
            {"budget": 128, "interval": 32, "window": 16, "calibration_text": text},
            extra_args=[{"kv_budget": 20}],
            max_model_len=1024,
        )
