"""Compression on vLLM's model runner V2, the one that runs on GPUs: its own code on the CPU, all of
its Triton kernels under the interpreter, against the dense float64 reference."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dense_judge import FLOAT32_ERROR, Judge
from dense_reference import DenseReference
from draft_models import write_near_copy
from engine_runs import (
    SMALL,
    EngineRun,
    ModelFolder,
    assert_pool_is_as_at_the_start,
    engine_job,
    generate,
    largest_error,
    random_prompt,
    replayed,
)
from interpreted_process import run_interpreted, run_script_interpreted
from tiny_model import write_tiny_model

from triattention_vllm.config import Settings
from triattention_vllm.engine.differences import RUNNER_V2_KNOWS_THE_CPU
from triattention_vllm.method.statistics import Statistics

SECONDS = 1500.0
pytestmark = [
    pytest.mark.skipif(not RUNNER_V2_KNOWS_THE_CPU, reason="refused on the CPU before vLLM 0.32"),
    pytest.mark.timeout(SECONDS + 60),
    pytest.mark.feature("Model runner V2", "not yet run on a GPU"),
]
BLOCK_SIZE = 32


def run_on_v2(
    model: Path,
    prompts: list[list[int]],
    lengths: list[int],
    settings: dict[str, Any] | None,
    backend: str = "CPU_ATTN",
    repeat: int = 1,
    **engine: Any,
) -> EngineRun:
    """As ``engine_runs.run_engine``."""
    own = {"max_model_len": 1024, "max_num_seqs": 8, **engine}
    job = engine_job(model, prompts, lengths, settings, repeat=repeat, **own)
    run: EngineRun = run_interpreted(generate, job, backend=backend, timeout=SECONDS)
    return run


def test_triton_alone_computes_what_the_dense_reference_computes(tmp_path: Path, text: str) -> None:
    """vLLM's attention and writer of KV blocks, and our score, selection, repack and shift: what a
    GPU would run, in the warm-up, in rounds between the chunks of a prompt and in decoding."""
    folder = write_tiny_model(tmp_path / "model", num_layers=2)
    run = run_on_v2(
        folder,
        [random_prompt(210, 2)],
        [24],
        {**SMALL, "calibration_text": text},
        backend="TRITON_ATTN",
        block_size=16,
        max_num_batched_tokens=64,
    )
    assert run.worker == "InterpretedGPUWorker"
    (request,) = run.requests
    dense = DenseReference(folder)
    result = replayed(run, request, dense, SMALL)
    assert request.boundaries == [192, 224]
    assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    full = dense.logprobs(request.token_ids[:-1])
    assert largest_error(request, full) > 100 * FLOAT32_ERROR, "eviction changed nothing"
    assert_pool_is_as_at_the_start(run)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_two_steps_in_flight_and_a_preemption(
    num_ranks: int,
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
) -> None:
    """And a model that is split over ranks of its own processes."""
    if len(os.sched_getaffinity(0)) < num_ranks:
        pytest.skip("two ranks need a core each")
    model, executor = model_folder("qwen3"), "mp" if num_ranks > 1 else "uni"
    tiny_pool = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    ranks = {"tensor_parallel_size": num_ranks, "distributed_executor_backend": executor}
    seen = run_script_interpreted(
        Path(__file__).with_name("ranks_script.py"),
        {
            "model": str(model),
            "settings": {**SMALL, "calibration_text": text},
            "prompts": [random_prompt(n, n) for n in (20, 110, 250)],
            "max_tokens": 180,
            "engines": [{"asynchronous": True, **tiny_pool, **ranks}],
        },
        timeout=SECONDS,
    )
    (run,) = seen["engines"]
    assert (run["scheduler"], run["queue_depth"]) == ("CompressionAsyncScheduler", 2)
    assert run["num_preemptions"] > 0
    statistics = Statistics.load(run["statistics"])
    judge = Judge(reference(model), statistics, Settings(**SMALL), BLOCK_SIZE)
    judge.check(run["requests"])
    assert all(request.num_rounds >= 2 for request in run["requests"])
    assert {len(kept) for kept in run["requests"][0].lives[0].kept} == {num_ranks}
    assert any(len(request.lives) > 1 for request in run["requests"])
    assert run["num_held"] == 0


def test_hits_of_the_prefix_cache_beside_two_compressed_groups(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """Full-attention layers beside windows, in two groups. Sent twice."""
    folder = model_folder("gemma3")
    settings = {**SMALL, "when": "pressure", "pressure_start": 1, "pressure_stop": 0}
    prompts = [random_prompt(n, n) for n in (50, 20, 90)]
    run = run_on_v2(
        folder, prompts, [150, 190, 150], {**settings, "calibration_text": text}, repeat=2
    )
    assert run.groups == [[0, 2], [1, 3]]
    assert [request.starts[0] for request in run.requests] == [32, 0, 64]
    for request in run.requests:
        result = replayed(run, request, reference(folder), settings)
        assert len(result.rounds) >= 2
        assert largest_error(request, result.logprobs) < 5e-4
    assert_pool_is_as_at_the_start(run)


def test_a_draft_model_has_its_own_compressed_cache(
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
    tmp_path: Path,
) -> None:
    folder = model_folder("qwen3")
    draft = str(write_near_copy(tmp_path / "draft", folder))
    run = run_on_v2(
        folder,
        [random_prompt(n, n) for n in (50, 90)],
        [150, 120],
        {**SMALL, "calibration_text": text},
        speculative_config={"method": "draft_model", "model": draft, "num_speculative_tokens": 3},
    )
    for request in run.requests:
        assert any(request.drafts)
        assert len(request.starts) < len(request.logprobs), "no draft was accepted"
        result = replayed(run, request, reference(folder), SMALL)
        assert len(result.rounds) >= 1
        assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    assert_pool_is_as_at_the_start(run)


def test_below_the_trigger_it_answers_as_without_compression(
    model_folder: ModelFolder, text: str
) -> None:
    """Rounds would begin at 160 tokens."""
    prompts, lengths = [random_prompt(n, n) for n in (5, 60, 100)], [40, 40, 40]
    folder = model_folder("qwen3")
    on = run_on_v2(folder, prompts, lengths, {**SMALL, "calibration_text": text})
    off = run_on_v2(folder, prompts, lengths, None)
    assert (on.scheduler, off.scheduler) == ("CompressionScheduler", "Scheduler")
    for one, other in zip(on.requests, off.requests, strict=True):
        assert not one.kept
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
