"""Requests of one batch, each by a budget of its own or without compression."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dense_judge import FLOAT32_ERROR
from dense_reference import DenseReference
from engine_runs import (
    SMALL,
    ModelFolder,
    assert_pool_is_as_at_the_start,
    largest_error,
    random_prompt,
    replayed,
    run_engine,
)
from fresh_process import ProcessError
from pool_world import IN_WORLD, PoolWorld
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from triattention_vllm.engine.requests import refuse_request


def api_config() -> Any:
    """The parts of an API process' configuration that a request is held against, before its
    engine has said what it holds."""
    return SimpleNamespace(
        instance_id="unknown", additional_config={"kv_compression": IN_WORLD.to_mapping()}
    )


def test_values_are_looked_at_before_the_pool_or_the_prompt_is_known() -> None:
    config = api_config()
    refuse_request(config, SamplingParams(extra_args={"kv_budget": 10**6}), 10)
    with pytest.raises(VLLMValidationError, match="kv_budget is 'x'.*parameter=kv_budget"):
        refuse_request(config, SamplingParams(extra_args={"kv_budget": "x"}), None)
    config.additional_config = {}
    refuse_request(config, SamplingParams(extra_args={"kv_budget": "x"}), 10)


@pytest.mark.feature("Images and video with M-RoPE", "refused")
def test_images_on_a_model_whose_positions_are_not_its_tokens_are_refused() -> None:
    """Regression: a round took the number of tokens for the position of the next query, of which
    an image has fewer. Below the first round there is nothing to score."""
    config = api_config()
    config.model_config = SimpleNamespace(uses_mrope=True, max_model_len=4096)

    def ask(max_tokens: int | None, extra_args: Any = None, has_media: bool = True) -> None:
        params = SamplingParams(max_tokens=max_tokens, extra_args=extra_args)
        refuse_request(config, params, 30, has_media=has_media)

    refused = 'requests of less than {} tokens .* and kv_compression "off"'
    for max_tokens in (26, None):
        with pytest.raises(VLLMValidationError, match=refused.format(48 + 8)):
            ask(max_tokens)
        ask(max_tokens, has_media=False)
        ask(max_tokens, {"kv_compression": "off"})
    ask(25)
    ask(50, {"kv_budget": 73})
    with pytest.raises(VLLMValidationError, match=refused.format(72 + 8)):
        ask(50, {"kv_budget": 72})
    config.model_config.uses_mrope = False
    ask(None)
    config.model_config.uses_mrope = True
    config.additional_config = {"kv_compression": replace(IN_WORLD, method="knorm").to_mapping()}
    ask(None)


def test_a_value_that_reached_the_scheduler_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    world = PoolWorld(IN_WORLD, 4, 64)
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
    world = PoolWorld(IN_WORLD, 4, 101, max_batched=16)
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
    budgets = [128, 256, 112, 1 << 20]
    asked = [None, {"kv_budget": 256}, {"kv_budget": 112}, {"kv_compression": "off"}]
    run = run_engine(
        folder,
        [random_prompt(length, length) for length in (40, 90, 33, 70)],
        [250, 300, 200, 330],
        {**SMALL, "calibration_text": text},
        extra_args=asked,
        repeat=2,
        max_model_len=1024,
        max_num_batched_tokens=64,
    )
    for request, budget in zip(run.requests, budgets, strict=True):
        result = replayed(run, request, reference(folder), {**SMALL, "budget": budget})
        assert bool(request.kept) == (budget < 1 << 20)
        assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    assert_pool_is_as_at_the_start(run)


def test_off_is_refused_where_the_groups_of_a_hybrid_model_cannot_hold_it(
    model_folder: ModelFolder, text: str
) -> None:
    """Regression: the API process counted the whole pool, and the scheduler compressed the request
    with a warning. 39 blocks of 32 tokens are shared by two groups of full attention and one of
    windows, which needs 5; half of the others' 17 blocks each is what one request may have."""
    with pytest.raises(
        ProcessError, match="VLLMValidationError: .*up to 500 .* allowed here are 272"
    ):
        run_engine(
            model_folder("gemma3"),
            [random_prompt(100, 1)],
            400,
            {**SMALL, "calibration_text": text},
            extra_args=[{"kv_compression": "off"}],
            max_model_len=1024,
            max_num_batched_tokens=64,
            num_gpu_blocks_override=40,
        )
