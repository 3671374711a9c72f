"""Models with layers of several kinds: full-attention layers are compressed, others left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_reference import DenseReference
from dense_replay import Replay
from engine_runs import (
    SMALL,
    EngineRun,
    ModelFolder,
    RequestRun,
    assert_pool_is_as_at_the_start,
    largest_error,
    random_prompt,
    replayed,
    run_engine,
)
from fresh_process import ProcessError
from vllm_limits import CPU_SINKS_MAY_BE_FLOAT32

from triattention_vllm.engine.differences import TRANSFORMERS_LAYERS_ARE_IN_THE_TREE

PRESSED = {**SMALL, "when": "pressure", "pressure_start": 1, "pressure_stop": 0}
"""Rounds of all requests before any of them takes a block of the step."""
LONG_PROMPT = 230
LINEAR = {"budget": 480, "interval": 96, "window": 32}
"""For blocks of 128 tokens, which hold a linear state."""


def assert_no_worse_than_before_the_first_round(request: RequestRun, result: Replay) -> None:
    """Float32 rounding differs between families; rounds must add none."""
    first_round = request.boundaries[0] - request.num_prompt
    before = largest_error(request, result.logprobs, end=first_round)
    assert largest_error(request, result.logprobs) < 2 * max(before, 1e-5)


@pytest.mark.feature("Sliding-window layers", "works")
@pytest.mark.parametrize(
    ("family", "groups", "settings"),
    [
        ("gemma3", [[0, 2], [1, 3]], PRESSED),
        pytest.param(
            "gpt_oss",
            [[0, 1]],
            SMALL,
            marks=pytest.mark.skipif(
                not CPU_SINKS_MAY_BE_FLOAT32,
                reason="vLLM itself fails at float32 sinks before 0.31",
            ),
        ),
        pytest.param(
            "smollm3",
            [[0, 1, 2, 3]],
            SMALL,
            marks=pytest.mark.skipif(
                not TRANSFORMERS_LAYERS_ARE_IN_THE_TREE, reason="refused before vLLM 0.30"
            ),
        ),
    ],
)
def test_full_attention_layers_are_compressed_and_the_others_left_alone(
    family: str,
    groups: list[list[int]],
    settings: dict[str, Any],
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
) -> None:
    """Regression: sliding-window groups were compacted through their null blocks. The requests are
    sent twice; the second time the prompts come from the prefix cache of both kinds of layers, and
    the first request is 64 tokens ahead of the second. Regression: where two groups are compressed,
    the blocks that its third round frees in one group were written by the second request's first
    round in the other group before they were read."""
    run = hybrid_run(model_folder(family), text, settings)
    assert run.groups == groups
    assert bool(run.num_handed_over) == (len(groups) > 1)
    dense = reference(model_folder(family))
    for request in run.requests:
        result = replayed(run, request, dense, settings)
        assert len(result.rounds) >= 3
        if request.num_prompt < LONG_PROMPT:
            assert_no_worse_than_before_the_first_round(request, result)
        assert largest_error(request, result.logprobs) < 5e-4
    # vLLM hashes windowed layers where a prompt ends, which for the long one lies behind rounds.
    assert 160 <= run.longest_hashed < LONG_PROMPT // run.block_size * run.block_size
    full = dense.logprobs(run.requests[0].token_ids[:-1])
    assert largest_error(run.requests[0], full) > 0.1, "eviction changed nothing"
    assert_pool_is_as_at_the_start(run)


@pytest.mark.skipif(TRANSFORMERS_LAYERS_ARE_IN_THE_TREE, reason="not refused since vLLM 0.30")
def test_models_whose_layers_vllm_hides_are_refused(model_folder: ModelFolder, text: str) -> None:
    with pytest.raises(ProcessError, match="Transformers backend, which through 0.29 does not say"):
        hybrid_run(model_folder("smollm3"), text, SMALL)


@pytest.mark.feature("Linear-attention layers", "works")
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_linear_states_are_left_alone_beside_compressed_layers(
    prefix_caching: bool, model_folder: ModelFolder, text: str
) -> None:
    """With prefix caching vLLM gives both kinds of layers blocks of one size and keeps states at
    block boundaries, without it a state is one block of ``max_model_len`` tokens. Regression: the
    state behind a long prompt was hashed although it had read what a round left.

    bfloat16 rounds log-probabilities by 0.2 on average here; rounds must add nothing.
    """
    folder = model_folder("qwen3_next")
    lengths = {200: 400, 500: 230, 900: 60} if prefix_caching else {500: 230}
    run = run_engine(
        folder,
        [random_prompt(n, n) for n in lengths],
        list(lengths.values()),
        {**LINEAR, "calibration_text": text},
        dtype="bfloat16",
        block_size=None,
        max_model_len=2048,
        max_num_batched_tokens=256,
        enable_prefix_caching=prefix_caching,
        repeat=1 + prefix_caching,
    )
    assert (run.block_size, run.groups) == (128, [[0, 1]])
    assert len(set(run.group_block_sizes)) == 2 - prefix_caching
    dense = DenseReference(folder, rounded_to=torch.bfloat16)
    for request in run.requests:
        assert bool(request.starts[0]) == prefix_caching or request.num_prompt == 900
        result = replayed(run, request, dense, LINEAR, tolerance=0.1)
        assert result.rounds
        first = max(0, result.rounds[0].round.nominal_boundary - request.num_prompt)
        rounding = mean_error(request, result.logprobs, 0, first) if first else 0.25
        assert mean_error(request, result.logprobs, first) < 1.2 * rounding
        full = dense.logprobs(request.token_ids[:-1])
        assert mean_error(request, full, first) > 4 * rounding, "eviction changed nothing"
    assert_pool_is_as_at_the_start(run)
    if prefix_caching:
        assert 384 <= run.longest_hashed < 900 // run.block_size * run.block_size


def mean_error(
    request: RequestRun, logprobs: torch.Tensor, start: int, end: int | None = None
) -> float:
    """Mean over positions of the largest difference there."""
    positions = list(enumerate(request.logprobs))[start:end]
    errors = [
        [abs(float(logprobs[request.num_prompt - 1 + i, t]) - v) for t, v in position.items()]
        for i, position in positions
    ]
    # Of tensors: NaN is the largest.
    return float(torch.stack([torch.tensor(of_one).max() for of_one in errors]).mean())


def hybrid_run(folder: Path, text: str, settings: dict[str, Any]) -> EngineRun:
    return run_engine(
        folder,
        [random_prompt(n, n) for n in (114, 50, LONG_PROMPT)],
        [130, 190, 80],
        {**settings, "calibration_text": text},
        max_model_len=1024,
        max_num_batched_tokens=64,
        repeat=2,
    )
