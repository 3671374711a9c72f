"""The script of ``fresh_process.run_on_v2``: vLLM's model runner V2, its own choice on a GPU.

vLLM's CPU build has that runner and switches Triton off when it is imported. Here Triton stays on,
and its interpreter runs every kernel on the CPU: slowly, so requests are few.
"""

import multiprocessing
import sys
from importlib import import_module
from typing import Any

import torch


def main() -> None:
    """Says that there is Triton before anything of vLLM asks, then calls the function."""
    backend, job, result = sys.argv[1:]
    platforms: Any = import_module("vllm.platforms")
    assert platforms.current_platform.is_cpu()
    platforms.vllm_version_matches_substr = lambda _: False
    keep_truth()
    # vLLM looks at a model class in one more process, because it may initialise CUDA.
    import_module("vllm.model_executor.models.registry")._run_in_subprocess = lambda look: look()
    # Workers and engines of their own are forks, which have this Triton too; vLLM would start new
    # processes.
    for name in ("vllm.v1.executor.multiproc_executor", "vllm.v1.engine.utils"):
        module: Any = import_module(name)
        assert callable(module.get_mp_context)
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    choose(backend)
    function, arguments = torch.load(job, weights_only=False)
    torch.save(function(*arguments), result)


def keep_truth() -> None:
    """Triton's interpreter makes integers of a truth value that becomes a block, which it then does
    not take as a mask; vLLM's kernels for grammars and for ngram drafts have such masks."""
    builder: Any = import_module("triton.runtime.interpreter").InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self: Any, block: Any, scalar: Any) -> Any:
        made = splat(self, block, scalar)
        if block.scalar.is_int1():
            made.data = made.data.astype(bool)
        return made

    builder.create_splat = create_splat


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
