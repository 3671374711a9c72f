"""fp8 KV caches: an engine that compresses reads, scores and moves what vLLM stored."""

import pytest
import torch
from dense_reference import DenseReference, Stored, exactly, fp8_e4m3, fp8_e5m2
from dense_replay import replay
from engine_runs import ModelFolder, RequestRun, random_prompt, run_engine

from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Statistics

SMALL = {"budget": 128, "interval": 32, "window": 16}
HAS_AVX512 = torch.cpu._is_avx512_supported()
STORED: dict[str, Stored] = {"fp8": fp8_e4m3, "fp8_e5m2": fp8_e5m2}


def largest_error(request: RequestRun, logprobs: torch.Tensor) -> float:
    """Engine against reference, over every log-probability that the engine returned."""
    return max(
        abs(float(logprobs[request.num_prompt - 1 + i, token]) - value)
        for i, position in enumerate(request.logprobs)
        for token, value in position.items()
    )


@pytest.mark.skipif(not HAS_AVX512, reason="vLLM's CPU build stores fp8 with AVX-512 only")
@pytest.mark.feature("fp8 KV", "works")
@pytest.mark.parametrize("kv_dtype", STORED)
def test_a_compressed_fp8_cache_is_scored_and_moved_as_stored(
    kv_dtype: str, model_folder: ModelFolder, text: str
) -> None:
    """The reference cuts keys and values as vLLM's CPU build does. A number on the edge between
    two of fp8's may fall on either side, so it is close to the engine and not equal: by far
    closer than a reference that keeps everything."""
    folder, prompt = model_folder("qwen3"), random_prompt(50, 1)
    run = run_engine(
        folder,
        [prompt],
        300,
        {**SMALL, "calibration_text": text},
        max_model_len=2048,
        kv_cache_dtype=kv_dtype,
    )
    (request,) = run.requests
    errors = []
    for stored, tolerance in ((STORED[kv_dtype], 0.01), (exactly, float("inf"))):
        assert run.statistics is not None
        result = replay(
            DenseReference(folder, stored=stored),
            request.token_ids[:-1],
            num_prompt=50,
            policy=Settings(**SMALL).policy(run.block_size),
            statistics=Statistics.load(run.statistics.split("kept in ")[-1]),
            kept_log=request.kept,
            tolerance=tolerance,
        )
        errors.append(largest_error(request, result.logprobs))
    assert len(request.kept) >= 5
    assert errors[0] < 0.2 * errors[1]
    assert run.num_free == run.num_blocks - 1
