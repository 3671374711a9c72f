"""``triattention calibrate`` with command lines that it refuses, one after the other."""

import os
import sys
import tempfile
from typing import Any

from triattention_vllm.tools.main import main


def run(job: dict[str, Any]) -> dict[str, tuple[int, str, str]]:
    """``job["commands"]``: name -> arguments. Returns exit status, standard output and error."""
    return {name: ended(arguments) for name, arguments in job["commands"].items()}


def ended(arguments: list[str]) -> tuple[int, str, str]:
    """Of one command line, with what was written past Python's own streams."""
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        before = os.dup(1), os.dup(2)
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        try:
            status = main(["calibrate", *arguments])
            sys.stdout.flush()
        finally:
            for descriptor, original in enumerate(before, start=1):
                os.dup2(original, descriptor)
                os.close(original)
        output.seek(0)
        errors.seek(0)
        return status, output.read(), errors.read()
