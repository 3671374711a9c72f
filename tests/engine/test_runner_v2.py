"""An engine of nothing but Triton on vLLM's model runner V2, as a GPU has it: all kernels under the
interpreter. Other engine tests run on that runner by ``pytest --runner-v2``."""

from pathlib import Path

import pytest
from dense_judge import FLOAT32_ERROR
from dense_reference import DenseReference
from engine_runs import (
    SMALL,
    EngineRun,
    assert_pool_is_as_at_the_start,
    engine_job,
    generate,
    largest_error,
    random_prompt,
    replayed,
)
from fresh_process import run_on_v2
from tiny_model import write_tiny_model

from triattention_vllm.engine.differences import RUNNER_V2_KNOWS_THE_CPU

SECONDS = 1500.0


@pytest.mark.skipif(not RUNNER_V2_KNOWS_THE_CPU, reason="refused on the CPU before vLLM 0.32")
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.feature("Model runner V2", "not yet run on a GPU")
def test_triton_alone_computes_what_the_dense_reference_computes(tmp_path: Path, text: str) -> None:
    """vLLM's attention and writer of KV blocks, and our score, selection, repack and shift: what a
    GPU would run, in the warm-up, in rounds between the chunks of a prompt and in decoding."""
    folder = write_tiny_model(tmp_path / "model", num_layers=2)
    job = engine_job(
        folder,
        [random_prompt(210, 2)],
        [24],
        {**SMALL, "calibration_text": text},
        max_model_len=1024,
        max_num_seqs=8,
        block_size=16,
        max_num_batched_tokens=64,
    )
    run: EngineRun = run_on_v2(generate, job, backend="TRITON_ATTN", timeout=SECONDS)
    assert run.worker == "InterpretedGPUWorker"
    (request,) = run.requests
    dense = DenseReference(folder)
    result = replayed(run, request, dense, SMALL)
    assert request.boundaries == [192, 224]
    assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    full = dense.logprobs(request.token_ids[:-1])
    assert largest_error(request, full) > 100 * FLOAT32_ERROR, "eviction changed nothing"
    assert_pool_is_as_at_the_start(run)
