"""A Python module that runs in a process of its own and reports as JSON, whatever happens to it.

For what must not be tried in this process: importing vLLM, which reads its environment once, and
compiling kernels.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ERROR, STEP = "error", "step"


def begin_report(file: str) -> dict[str, Any]:
    """In the child: a dict that is written to ``file`` when this process ends, also by an error,
    which then stands under ``error``, or by ``exit``. Keep its ``step`` up to date."""
    report: dict[str, Any] = {}

    def remember(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        report[ERROR] = str(error) or kind.__name__
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = remember
    atexit.register(lambda: Path(file).write_text(json.dumps(report), encoding="utf-8"))
    return report


def run_child(
    module: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """In the parent: run ``python -m module REPORT arguments...`` and return its report.

    Where it ended with another status than 0, ``error`` is set: the error that it reported, else
    the last line that it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="triattention-") as folder:
        file = Path(folder, "report.json")
        done = subprocess.run(
            [sys.executable, "-m", module, str(file), *arguments],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        written = file.read_text(encoding="utf-8") if file.is_file() else "{}"
    report: dict[str, Any] = json.loads(written)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        ended = f"the process ended with status {done.returncode}"
        report.setdefault(ERROR, lines[-1] if lines else ended)
    return report
