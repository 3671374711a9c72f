"""vLLM's CUDA metadata builders, with ours in front, look past the null head."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import ModelFolder


@pytest.fixture(scope="module")
def built(model_folder: ModelFolder) -> dict[str, dict[str, object]]:
    """What vLLM's own builders made, by backend; from a process with interpreted Triton."""
    script = Path(__file__).with_name("cuda_builders_script.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(model_folder("qwen3"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {result["name"]: result for result in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.feature("CUDA graphs", "not yet run on a GPU")
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_cuda_metadata_is_built_from_shifted_rows(
    backend: str, built: dict[str, dict[str, object]]
) -> None:
    """Regression: silently nothing under another model runner or under full CUDA graphs."""
    result = built[backend]
    assert result["rows"] == [[5, 6], [7, 8], [9, 10]]
    assert result["seq_lens"] == [31, 30, 32, 0]
    assert result["max_seq_len"] == 32
    assert result["slots"] == [0, 1, 2]
    assert result["same_memory"], "a captured graph would read the first step for ever"
    assert not result["goes_around_build"]
    assert not result["fused_drafts"]
