"""Methods beside TriAttention in a real engine: they start without statistics and really decide."""

from pathlib import Path

import torch
from engine_runs import ModelFolder, random_prompt, run_engine


def test_streamingllm_keeps_sinks_and_the_latest_and_needs_no_calibration(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    settings = {
        "method": "streamingllm",
        "budget": 128,
        "interval": 32,
        "window": 16,
        "protect": "sinks",
        "sink_tokens": 8,
    }
    run = run_engine(
        model_folder("qwen3"),
        [random_prompt(40, 1), random_prompt(90, 2)],
        200,
        settings,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=512,
        enforce_eager=True,
        dtype="float32",
    )
    assert run.statistics is None
    for request in run.requests:
        assert len(request.kept) >= 3
        for kept in request.kept:
            assert kept[..., :8].equal(torch.arange(8).expand_as(kept[..., :8]))
            latest = kept[..., 8:]
            num_tokens = int(latest.max()) + 1
            assert num_tokens % 32 == 0
            expected = torch.arange(num_tokens - latest.shape[-1], num_tokens)
            assert latest.equal(expected.expand_as(latest))
