"""Functions in processes of their own that have vLLM imported when they begin.

Importing vLLM takes longer than a tiny model's engine does. So one process imports it and does
nothing else, and every run is a fork of that: engines of different settings share no process.
"""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import torch
from fresh_script import ON_TRITONS_INTERPRETER

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        # None of them starts a thread, or reads what ``environment`` sets: forks may do both.
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.models.qwen3",
    ]
)
ONE_ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "triattention_vllm",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
"""Environment of an engine whose core runs in the process that makes it."""
SLOWER = 6
"""What Triton's interpreter may take, in times of what the CPU build takes on model runner V1."""
always_on_v2 = False
"""Set by the option ``--runner-v2``: every process is as one of ``run_on_v2``."""


class ProcessError(RuntimeError):
    """The process ended with an error; the message is the end of its output."""


def run_fresh(
    function: Callable[..., Any], *arguments: object, environment: Mapping[str, str], timeout: float
) -> Any:
    """What ``function(*arguments)`` returned in a fork whose environment is this process's, with
    ``environment`` on top. Raises ProcessError where it failed or took more than ``timeout``
    seconds."""
    if always_on_v2:
        return run_on_v2(function, *arguments, environment=environment, timeout=SLOWER * timeout)
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        # A pipe, since functions may limit how much their process writes to files.
        receiver, output = _FORKS.Pipe(duplex=False)
        result = Path(folder, "result")
        own = {**os.environ, **ONE_ENGINE, **environment}
        process = _FORKS.Process(target=_run, args=(function, arguments, own, output, result))
        process.start()
        output.close()
        said = bytearray()
        reader = Thread(target=_read, args=(receiver, said), daemon=True)
        reader.start()
        try:
            process.join(timeout)
            ended = process.exitcode
        finally:
            process.kill()
            process.join()
        if ended != 0:
            reader.join(5)
            how = f"did not end in {timeout:g} s" if ended is None else f"ended with {ended}"
            end = said[-12000:].decode(errors="replace")
            raise ProcessError(f"{function.__name__} {how}:\n{end}")
        return torch.load(result, weights_only=False)


def run_on_v2(
    function: Callable[..., Any],
    *arguments: object,
    backend: str = "CPU_ATTN",
    environment: Mapping[str, str] = MappingProxyType({}),
    timeout: float,
) -> Any:
    """As ``run_fresh``, in a process whose vLLM runs model runner V2, all kernels of Triton under
    its interpreter. ``backend``: CPU_ATTN is fast; TRITON_ATTN runs nothing but Triton, vLLM's
    attention and writer of KV blocks and this package's own kernels in the place of their PyTorch
    implementations, and its worker is this package's for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job"), Path(folder, "result")
        torch.save((function, arguments), job)
        own = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        script = Path(__file__).with_name("interpreted_process.py")
        try:
            done = subprocess.run(
                [sys.executable, script, backend, job, result],
                env={**os.environ, **ONE_ENGINE, **environment, **ON_TRITONS_INTERPRETER, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise ProcessError(f"{function.__name__} did not end in {timeout:g} s") from error
        end = done.stdout[-12000:]
        if done.returncode != 0:
            raise ProcessError(f"{function.__name__} ended with {done.returncode}:\n{end}")
        assert "Using V2 Model Runner" in done.stdout, end
        return torch.load(result, weights_only=False)


def _read(receiver: Connection, said: bytearray) -> None:
    with receiver:
        while part := os.read(receiver.fileno(), 1 << 16):
            said += part


def run_script(
    script: Path, job: Mapping[str, Any], *, timeout: float = 550, **environment: str
) -> Any:
    """What the function ``run`` of a script returned for ``job``, see ``run_fresh``."""
    return run_fresh(run_script_here, script, dict(job), environment=environment, timeout=timeout)


def run_script_here(script: Path, job: dict[str, Any]) -> Any:
    """What its function ``run`` returns for ``job``, in this process."""
    # Workers inherit the path, and find there what they are asked to call.
    sys.path.insert(0, str(script.parent))
    return import_module(script.stem).run(job)


def _start_server() -> None:
    """OpenMP counts its threads when torch is imported."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = ONE_ENGINE["OMP_NUM_THREADS"]
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _run(
    function: Callable[..., Any],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    output: Connection,
    result: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # vLLM looks at a model class in one more process, because it may initialise CUDA.
    import_module("vllm.model_executor.models.registry")._run_in_subprocess = lambda look: look()
    torch.save(function(*arguments), result)
    # A fork of multiprocessing ends without what other processes do at their end.
    atexit._run_exitfuncs()
