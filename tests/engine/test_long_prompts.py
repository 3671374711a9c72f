"""Prompts of many budgets are compressed while they are prefilled, in chunks of any size."""

from pathlib import Path
from typing import Any

import pytest
from dense_judge import Judge
from dense_reference import DenseReference
from engine_runs import random_prompt
from fresh_process import run_script
from tiny_model import write_tiny_model

from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Statistics

SETTINGS = {"budget": 256, "interval": 64, "window": 32}
BLOCK_SIZE = 32
NUM_BLOCKS = 320
LONGEST = 65_536
CHUNKS = (64, 512, 2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small layer: it is the lengths that are large here."""
    return write_tiny_model(
        tmp_path_factory.mktemp("long") / "model",
        num_layers=1,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_position_embeddings=LONGEST + 64,
    )


@pytest.fixture(scope="module")
def run(model: Path, text: str) -> dict[str, Any]:
    """64k tokens in chunks of 8192, then a long prompt beside two that decode, by chunk size."""
    mixed = [random_prompt(40, 1), random_prompt(2300, 2), random_prompt(90, 3)]
    seen: dict[str, Any] = run_script(
        Path(__file__).with_name("long_prompts_script.py"),
        {
            "model": str(model),
            "settings": {**SETTINGS, "calibration_text": text},
            "max_model_len": LONGEST + 64,
            "num_blocks": NUM_BLOCKS,
            "cases": [
                (8192, [random_prompt(LONGEST, 4)], [40]),
                *((chunk, mixed, [60, 40, 60]) for chunk in CHUNKS),
            ],
        },
    )
    return seen


def most_blocks(chunk: int) -> int:
    """``B + I`` and one chunk."""
    return -(-(SETTINGS["budget"] + SETTINGS["interval"] + chunk) // BLOCK_SIZE)


@pytest.mark.feature("Chunked prefill", "works")
@pytest.mark.feature("max_model_len beyond the pool", "works")
def test_a_prompt_of_64k_tokens_runs_in_a_pool_of_a_sixth_of_it(run: dict[str, Any]) -> None:
    (request,) = run["cases"][0]
    assert len(request.token_ids) == LONGEST + 40
    assert NUM_BLOCKS * BLOCK_SIZE < LONGEST / 6
    assert request.most_blocks <= most_blocks(8192)
    assert request.num_rounds >= LONGEST // 8192 - 1
    assert run["num_preemptions"] == 0
    assert run["num_held"] == 0


@pytest.mark.feature("Chunked prefill", "works")
@pytest.mark.parametrize("case", range(len(CHUNKS)), ids=[f"chunks of {n}" for n in CHUNKS])
def test_chunks_of_any_size_beside_decoding_requests_keep_what_they_still_need(
    case: int, run: dict[str, Any], model: Path
) -> None:
    """Regression: eviction in the middle of a chunked prefill dropped tokens that the same chunk
    still needed."""
    chunk, requests = CHUNKS[case], run["cases"][case + 1]
    judge = Judge(
        DenseReference(model), Statistics.load(run["statistics"]), Settings(**SETTINGS), BLOCK_SIZE
    )
    judge.check(requests)
    longest = max(requests, key=lambda request: request.num_prompt)
    largest = max(step.end - step.start for step in longest.lives[0].steps)
    assert 0.9 * chunk < largest <= chunk
    assert longest.num_rounds > 0
    assert max(request.most_blocks for request in requests) <= most_blocks(chunk)
