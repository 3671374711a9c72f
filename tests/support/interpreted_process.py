"""Functions in a process whose vLLM runs model runner V2, which on a GPU is its own choice.

vLLM's CPU build has that runner and switches Triton off when it is imported. Here Triton stays on,
and its interpreter runs every kernel on the CPU: slowly, so requests are few.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from fresh_process import ONE_ENGINE, run_script_here
from fresh_script import ON_TRITONS_INTERPRETER

BACKENDS = ("CPU_ATTN", "TRITON_ATTN")
"""CPU_ATTN is fast. TRITON_ATTN runs nothing but Triton: vLLM's attention and writer of KV blocks,
and this package's own kernels, in the place of their PyTorch implementations; and its worker is
this package's for a GPU."""


def run_interpreted(
    function: Callable[..., Any], *arguments: object, backend: str = "CPU_ATTN", timeout: float
) -> Any:
    """What ``function(*arguments)`` returned there. AssertionError with the end of what it said
    where it failed."""
    with tempfile.TemporaryDirectory() as name:
        job, result = Path(name, "job"), Path(name, "result")
        torch.save((function, arguments), job)
        own = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, __file__, backend, str(job), str(result)],
            env={**os.environ, **ONE_ENGINE, **ON_TRITONS_INTERPRETER, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout[-12000:]
        assert "Using V2 Model Runner" in done.stdout, done.stdout[-12000:]
        return torch.load(result, weights_only=False)


def run_script_interpreted(script: Path, job: dict[str, Any], *, timeout: float) -> Any:
    """As ``fresh_process.run_script``."""
    return run_interpreted(run_script_here, script, job, timeout=timeout)


def main() -> None:
    """In the process: say that there is Triton before anything of vLLM asks."""
    backend, job, result = sys.argv[1:]
    platforms: Any = import_module("vllm.platforms")
    assert platforms.current_platform.is_cpu()
    platforms.vllm_version_matches_substr = lambda _: False
    # vLLM looks at a model class in one more process, because it may initialise CUDA.
    import_module("vllm.model_executor.models.registry")._run_in_subprocess = lambda look: look()
    # Workers of their own are forks, which have this Triton too; vLLM would start new processes.
    executor: Any = import_module("vllm.v1.executor.multiproc_executor")
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    choose(backend)
    function, arguments = torch.load(job, weights_only=False)
    torch.save(function(*arguments), result)


def choose(backend: str) -> None:
    """The only attention backend of the platform, and the kernels that go with it."""
    if backend == "CPU_ATTN":
        return
    registry = import_module("vllm.v1.attention.backends.registry")
    path = registry.AttentionBackendEnum[backend].get_path
    platform: Any = import_module("vllm.platforms.cpu").CpuPlatform
    platform.get_attn_backend_cls = classmethod(lambda *_args, **_kwargs: path())
    # Its writer of KV blocks asks a device for this.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for operation in ("compact", "fill_holes", "score", "select", "shift"):
        module: Any = import_module(f"triattention_kernels.{operation}")
        assert callable(module.choose)
        module.choose = lambda *_: "triton"
    choice: Any = import_module("triattention_vllm.engine.worker_choice")
    choice.WORKERS[choice.CPU_WORKER] = "interpreted_worker.InterpretedGPUWorker"


if __name__ == "__main__":
    main()
