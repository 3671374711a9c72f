"""Caches that vLLM's own GPU writers filled, read through the views that rounds work on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def differences() -> dict[str, list[float]]:
    """By layout: largest error of keys and of values, relative to their token."""
    script = Path(__file__).with_name("gpu_layouts_script.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    layout: str, precision: float, differences: dict[str, list[float]]
) -> None:
    """The tokens are numbers that fp8 has; int8 has 127 steps up to the largest element."""
    assert max(differences[layout]) <= precision
