"""Run functions on Triton kernels: on the GPU here, else in a process that interprets them.

Whether kernels are compiled or interpreted is settled when triton is first imported, so the
interpreter has a process of its own, whatever the tests around it import.
"""

import functools
import importlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_triton(function: str, *arguments: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """Call ``module:name`` on copies of the arguments that keep strides and shared storage.

    Returns the result and the arguments as the call left them, on the CPU. What the call raises
    is raised here.
    """
    call = _packed((function, arguments, options))
    answer = _answer(call) if DEVICE == "cuda" else _interpreter().submit(_answer, call).result()
    return _unpacked(answer, "cpu")


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _interpret)


def _interpret() -> None:
    """Runs first in the interpreting process."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN


def _answer(call: bytes) -> bytes:
    function, arguments, options = _unpacked(call, DEVICE)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(*arguments, **options)
    return _packed((result, arguments))


def _packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes, device: str) -> Any:
    return torch.load(io.BytesIO(content), map_location=device, weights_only=False)
