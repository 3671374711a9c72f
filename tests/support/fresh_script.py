"""Scripts that a test runs in a process of their own: something must be set before an import."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ON_TRITONS_INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment in which Triton's kernels run on the CPU."""


def answer_of(script: Path, *arguments: str, environment: Mapping[str, str]) -> Any:
    """The JSON on the last line that ``script`` writes.

    It imports what this process can, and what is in the folder that ``environment`` may name as
    PYTHONPATH. AssertionError with the end of what it said where it fails.
    """
    folders = [*filter(None, sys.path), *filter(None, [environment.get("PYTHONPATH")])]
    own = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=own,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
