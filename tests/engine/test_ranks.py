"""A model that is split over ranks compresses as one rank does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_runs import ModelFolder, random_prompt


def generate(model: Path, text: str, binding: str, **engine: Any) -> list[dict[str, Any]]:
    """Two long answers from an engine whose workers are processes of their own."""
    job = {
        "model": str(model),
        "prompts": [random_prompt(n, n) for n in (20, 110)],
        "max_tokens": 260,
        "settings": {"budget": 128, "interval": 32, "window": 16, "calibration_text": text},
        "engine": engine,
    }
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "triattention_vllm",
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("ranks_script.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    return result


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_tensor_parallel_ranks_compress_as_one_rank_does(
    model_folder: ModelFolder, text: str
) -> None:
    """Regression: each rank used the statistics of head 0 upward instead of its own heads.

    Another choice of survivors changes log-probabilities by whole units, rounding by 1e-4.
    """
    model = model_folder("qwen3")
    alone = generate(model, text, "nobind")
    cores = sorted(os.sched_getaffinity(0))[:2]
    split = generate(model, text, f"{cores[0]}|{cores[1]}", tensor_parallel_size=2)
    for one, other in zip(alone, split, strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-3)
