"""Caches that vLLM's own GPU writers filled, read through the views that rounds work on."""

from pathlib import Path
from typing import Any

import pytest
from fresh_script import ON_TRITONS_INTERPRETER, answer_of

from triattention_vllm.engine.differences import BLOCKS_ARE_SPLIT_IN_GROUPS

pytestmark = pytest.mark.skipif(
    not BLOCKS_ARE_SPLIT_IN_GROUPS,
    reason="vLLM's writers need Triton, which its CPU build switches off through 0.31",
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """``differences`` by layout: largest error of keys and of values, relative to their token;
    ``refusals``: what is said of layouts that are not read.
    """
    script = Path(__file__).with_name("gpu_layouts_script.py")
    answer: dict[str, dict[str, Any]] = answer_of(script, environment=ON_TRITONS_INTERPRETER)
    return answer


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("auto", 0.0),
        ("rocm", 0.0),
        ("fp8", 0.0),
        ("fp8_per_token_head", 0.0),
        ("int8_per_token_head", 0.51 / 127),
    ],
)
def test_tokens_are_read_back_to_the_precision_of_their_kv_dtype(
    layout: str, precision: float, found: dict[str, dict[str, Any]]
) -> None:
    """The tokens are numbers that fp8 has; int8 has 127 steps up to the largest element."""
    assert all(difference <= precision for difference in found["differences"][layout])


def test_layouts_of_rocm_that_cannot_be_read_are_refused(found: dict[str, dict[str, Any]]) -> None:
    refusals = found["refusals"]
    for backend in ("ROCM_ATTN", "ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_FA"):
        assert refusals[backend] == (
            "KV dtype 'fp8_e5m2' is read as e4m3 by this attention backend and may be written as "
            "e5m2; set --kv-cache-dtype fp8, or start without --kv-compression"
        )
    assert refusals["ROCM_AITER_UNIFIED_ATTN fp8"] == refusals["ROCM_AITER_FA fp8"] == ""
    assert refusals["shuffled"] == (
        "the shuffled KV cache of AITER mixes the tokens of a block; unset "
        "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT, or start without --kv-compression"
    )
    assert "stores several tokens' values mixed; choose another" in refusals["interleaved"]
