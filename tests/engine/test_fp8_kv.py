"""fp8 KV caches: an engine that compresses reads, scores and moves what vLLM stored."""

import pytest
import torch
from dense_reference import DenseReference, Stored, exactly, fp8_e4m3, fp8_e5m2
from engine_runs import (
    SMALL,
    ModelFolder,
    assert_pool_is_as_at_the_start,
    largest_error,
    random_prompt,
    replayed,
    run_engine,
)

HAS_AVX512 = torch.cpu._is_avx512_supported()
STORED: dict[str, Stored] = {"fp8": fp8_e4m3, "fp8_e5m2": fp8_e5m2}


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
        dense = DenseReference(folder, stored=stored)
        result = replayed(run, request, dense, SMALL, tolerance=tolerance)
        errors.append(largest_error(request, result.logprobs))
    assert len(request.kept) >= 5
    assert errors[0] < 0.2 * errors[1]
    assert_pool_is_as_at_the_start(run)
