"""Methods beside TriAttention in a real engine: they start without statistics and really decide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_judge import Judge
from dense_reference import DenseReference
from engine_runs import ModelFolder, random_prompt
from fresh_process import run_script
from observed_scores import ObservedScores

from triattention_vllm.config import Settings
from triattention_vllm.method.scorers import OBSERVING_SCORERS

LOOKING = {
    "budget": 128,
    "interval": 32,
    "window": 32,
    "protect": "sinks",
    "sink_tokens": 8,
    "selection": "per_layer_per_head",
}
BLOCK_SIZE = 32
LIMIT = 1500
"""Seconds for five engines, four of which have taken 550 beside other work."""
pytestmark = pytest.mark.timeout(LIMIT + 300)
LONG_PROMPT = random_prompt(200, 3)


@pytest.fixture(scope="module")
def looking(model_folder: ModelFolder) -> dict[str, Any]:
    """One process in which every method that looks at queries runs, and StreamingLLM."""
    seen: dict[str, Any] = run_script(
        Path(__file__).with_name("query_methods_script.py"),
        {
            "model": str(model_folder("qwen3")),
            "methods": [*OBSERVING_SCORERS, "streamingllm"],
            "settings": LOOKING,
            # 12 of 32 tokens; four requests need five each, besides what a chunk takes.
            "num_blocks": 13,
            "length": 130,
            "prompts": [
                LONG_PROMPT,
                LONG_PROMPT[:185],
                random_prompt(40, 5),
                random_prompt(45, 6),
                random_prompt(300, 7),
            ],
        },
        timeout=LIMIT,
    )
    return seen


@pytest.mark.parametrize("method", OBSERVING_SCORERS)
def test_methods_that_look_at_queries_keep_what_the_dense_reference_scores_highest(
    method: str,
    looking: dict[str, Any],
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
) -> None:
    """Several requests at once, of which some are preempted and start again, chunked prompts, and
    a hit that ends behind the boundary of the first round, whose queries nobody computed."""
    run = looking[method]
    judge = Judge(
        reference(model_folder("qwen3")),
        lambda life: ObservedScores(method, life.num_hits),
        Settings(method=method, **LOOKING),
        BLOCK_SIZE,
    )
    judge.check(run["requests"])
    assert all(request.num_rounds for request in run["requests"])
    assert run["requests"][1].lives[0].num_hits == 160
    again = [request for request in run["requests"] if len(request.lives) > 1]
    assert run["num_preemptions"] >= len(again) > 0
    assert any(life.kept for request in again for life in request.lives[1:])
    assert run["num_held"] == 0


def test_streamingllm_keeps_sinks_and_the_latest_and_needs_no_calibration(
    looking: dict[str, Any],
) -> None:
    run = looking["streamingllm"]
    assert run["statistics"] is None
    rounds = [kept for request in run["requests"] for life in request.lives for kept in life.kept]
    assert len(rounds) >= 10
    for (kept,) in rounds:
        assert kept[..., :8].equal(torch.arange(8).expand_as(kept[..., :8]))
        latest = kept[..., 8:]
        num_tokens = int(latest.max()) + 1
        assert num_tokens % BLOCK_SIZE == 0
        expected = torch.arange(num_tokens - latest.shape[-1], num_tokens)
        assert latest.equal(expected.expand_as(latest))
