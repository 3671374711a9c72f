"""A model that is split over ranks, and steps that are scheduled ahead, compress as one does."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_judge import FLOAT32_ERROR, Judge
from dense_reference import DenseReference
from dense_replay import replay
from engine_runs import SMALL, ModelFolder, random_prompt
from fresh_process import run_script
from observed_scores import ObservedScores
from tiny_model import write_tiny_model

from triattention_vllm.config import Settings
from triattention_vllm.method.scorers import OBSERVING_SCORERS
from triattention_vllm.method.statistics import Statistics

BLOCK_SIZE = 32
TWO_CORES = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two ranks need a core each"
)
COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""What vLLM 0.32's CPU build needs for a pipeline: its eager mode skips the warm-up that makes the
buffers between stages."""
TINY_POOL = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 32, "max_num_seqs": 8}
"""9 blocks of 32 tokens: two requests that are due for a round need 10."""


def generate(
    model: Path, settings: dict[str, Any], num_ranks: int, *engines: dict[str, Any], **job: Any
) -> list[dict[str, Any]]:
    """Long answers of every engine; ranks are bound to two cores in turns."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = "|".join(str(cores[rank % 2]) for rank in range(num_ranks))
    job = {"prompts": [random_prompt(n, n) for n in (20, 110)], "max_tokens": 220, **job}
    seen = run_script(
        Path(__file__).with_name("ranks_script.py"),
        {"model": str(model), "settings": settings, "engines": list(engines), **job},
        VLLM_CPU_OMP_THREADS_BIND="nobind" if num_ranks == 1 else binding,
    )
    result: list[dict[str, Any]] = seen["engines"]
    return result


@pytest.mark.feature("Tensor parallel", "works")
@pytest.mark.feature("Pipeline parallel", "works")
@pytest.mark.feature("Tensor x pipeline parallel", "works")
@TWO_CORES
@pytest.mark.parametrize(
    ("tensor", "pipeline", "method", "selection", "asynchronous"),
    [
        (2, 1, "h2o", "per_head", True),
        (2, 1, "triattention", "per_head", True),
        (1, 2, "rkv", "per_layer_per_head", False),
        (2, 2, "triattention", "per_head", False),
    ],
)
def test_ranks_keep_what_the_dense_reference_keeps(
    tensor: int,
    pipeline: int,
    method: str,
    selection: str,
    asynchronous: bool,
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
) -> None:
    """Regression: each rank used the statistics of head 0 upward instead of its own heads.

    The reference is one model: every rank's heads and layers are held against theirs in it. Across
    the stages of a pipeline only ``per_head`` differs from one rank: its mean is over the layers of
    a stage. Each rank records the queries of its own heads and layers, and requests that are
    preempted record anew; with asynchronous scheduling the next step is then on its way.
    """
    model = model_folder("qwen3")
    settings = {**SMALL, "selection": selection, "method": method}
    looks_at_queries = method in OBSERVING_SCORERS
    in_a_tiny_pool = looks_at_queries or asynchronous
    # Statistics are made from prompts of at least 64 tokens in one step.
    tiny_pool = TINY_POOL if looks_at_queries else {**TINY_POOL, "max_num_batched_tokens": 64}
    if looks_at_queries:
        settings["window"] = OBSERVING_SCORERS[method].num_queries
    (run,) = generate(
        model,
        settings if looks_at_queries else {**settings, "calibration_text": text},
        tensor * pipeline,
        {
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
            "distributed_executor_backend": "mp",
            "asynchronous": asynchronous,
            **(tiny_pool if in_a_tiny_pool else {}),
            **(COMPILED if pipeline > 1 else {}),
        },
    )
    assert run["executor"] == "MultiprocExecutor"
    assert run["queue_depth"] == (2 if asynchronous else pipeline)
    judge = Judge(
        reference(model),
        (lambda life: ObservedScores(method, life.num_hits))
        if looks_at_queries
        else Statistics.load(run["statistics"]),
        Settings(**settings),
        BLOCK_SIZE,
        num_stages=pipeline,
    )
    assert bool(run["num_preemptions"]) == in_a_tiny_pool
    for request in run["requests"]:
        assert request.num_rounds >= 3
        assert {len(kept) for life in request.lives for kept in life.kept} == {tensor * pipeline}
        judge.check_one(request)
    if pipeline > 1 and selection == "per_head":
        stages = run["requests"][0].lives[-1].kept[-1]
        assert not torch.equal(stages[0], stages[tensor]), "stages chose alike by accident"
    assert run["num_held"] == 0


@pytest.mark.feature("Async scheduling", "works")
def test_async_scheduling_picks_the_same_candidates_and_notices_a_token_later(
    tmp_path: Path, text: str
) -> None:
    """Regression: stale drop counts with 100 requests and more. What a round keeps follows from
    its nominal boundary. Only the token at the boundary itself still sees everything, because its
    step was scheduled ahead; so the log-probabilities are the same up to that token."""
    model = write_tiny_model(tmp_path / "model", num_layers=2, hidden_size=128, head_dim=32)
    settings = {"budget": 96, "interval": 32, "window": 8, "protect": "sinks"}
    sync, ahead = generate(
        model,
        {**settings, "calibration_text": text},
        1,
        {},
        {"asynchronous": True, "distributed_executor_backend": "mp"},
        prompts=[random_prompt(20 + seed % 23, seed) for seed in range(112)],
        max_tokens=150,
    )
    assert (sync["scheduler"], sync["queue_depth"]) == ("CompressionScheduler", 1)
    assert (ahead["scheduler"], ahead["queue_depth"]) == ("CompressionAsyncScheduler", 2)
    assert ahead["executor"] == "MultiprocExecutor"
    assert sync["most_running"] == ahead["most_running"] == 112
    judge = Judge(
        DenseReference(model),
        Statistics.load(ahead["statistics"]),
        Settings(**settings),
        BLOCK_SIZE,
    )
    for one, other in zip(sync["requests"], ahead["requests"], strict=True):
        assert one.num_rounds == other.num_rounds >= 2
        first, late = one.lives[0], other.lives[0]
        assert torch.equal(first.kept[0][0], late.kept[0][0])
        boundary = next(step for step in first.steps if step.had_round).start
        assert next(step for step in late.steps if step.had_round).start == boundary + 1
        num_before = boundary - one.num_prompt
        for position, also in zip(
            one.logprobs[:num_before], other.logprobs[:num_before], strict=True
        ):
            assert position == pytest.approx(also, abs=1e-4)
        judge.check_one(other)
    assert ahead["num_held"] == 0


@pytest.mark.feature("Data parallel", "works")
@TWO_CORES
def test_data_parallel_ranks_answer_alike_and_as_the_dense_reference(
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both engines start with one empty folder of statistics between them."""
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "statistics"))
    model = model_folder("qwen3")
    answers = run_script(
        Path(__file__).with_name("data_parallel_script.py"),
        {
            "model": str(model),
            "settings": {**SMALL, "calibration_text": text},
            "prompts": [random_prompt(n, n) for n in (20, 60)],
            "max_tokens": 220,
        },
    )
    (statistics,) = (tmp_path / "statistics").rglob("*.safetensors")
    assert [answer["rank"] for answer in answers] == [0, 1] * 2
    for answer in answers:
        computed = answer["token_ids"][:-1]
        result = replay(
            reference(model),
            computed,
            num_prompt=answer["num_prompt"],
            policy=Settings(**SMALL).policy(BLOCK_SIZE),
            statistics=Statistics.load(statistics),
        )
        assert len(result.rounds) >= 3
        for position, logprobs in enumerate(answer["logprobs"], start=answer["num_prompt"]):
            for token, value in logprobs.items():
                assert value == pytest.approx(
                    float(result.logprobs[position - 1, token]), abs=FLOAT32_ERROR
                )
