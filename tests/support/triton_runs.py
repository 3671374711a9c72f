"""Run functions on Triton kernels: on the GPU here, else in a process that interprets them.

Whether kernels are compiled or interpreted is settled when triton is first imported, so the
interpreter has a process of its own, whatever the tests around it import.
"""

import functools
import importlib
import io
import os
import subprocess
import sys
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_triton(function: str, *arguments: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """Call ``module:name`` on copies of the arguments that keep strides and shared storage.

    Returns the result and the arguments as the call left them, on the CPU. What the call raises
    is raised here.
    """
    call = _packed((function, arguments, options))
    if DEVICE == "cuda":
        return _unpacked(_answer(call), "cpu")
    process = _interpreter()
    assert process.stdin is not None
    assert process.stdout is not None
    _send(process.stdin, call)
    answer = _unpacked(_receive(process.stdout), "cpu")
    if isinstance(answer, Exception):
        raise answer
    return answer


@functools.cache
def _interpreter() -> "subprocess.Popen[bytes]":
    """Ends by itself when this process closes its pipe."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not mix with the answers
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    while header := sys.stdin.buffer.read(8):
        call = sys.stdin.buffer.read(int.from_bytes(header, "little"))
        try:
            answer = _answer(call)
        except Exception as error:  # noqa: BLE001 - raised again on the other side
            answer = _packed(error)
        _send(answers, answer)


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


def _send(stream: Any, content: bytes) -> None:
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def _receive(stream: Any) -> bytes:
    header = stream.read(8)
    assert len(header) == 8, "the interpreting process ended; its message is above"
    return bytes(stream.read(int.from_bytes(header, "little")))


if __name__ == "__main__":
    _serve()
