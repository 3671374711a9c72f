"""Which of our workers runs in the place of vLLM's: names alone, each imported where it runs."""

import logging
from collections.abc import Mapping

from triattention_vllm.environment import ALLOW_UNTESTED_VLLM, allows_untested_vllm
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.log import log_once

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
WORKERS = {
    CPU_WORKER: f"{__package__}.worker_cpu.CompressionCPUWorker",
    GPU_WORKER: f"{__package__}.worker.CompressionGPUWorker",
}
"""vLLM's worker class -> ours."""


def compression_worker_class(worker_cls: str, environ: Mapping[str, str]) -> str:
    """Our worker in the place of the one that vLLM resolved for the platform.

    Raises UnsupportedError where there is none, or where it has not been verified and the user
    has not accepted that in the environment.
    """
    if worker_cls == GPU_WORKER:
        found = "KV compression has not been verified on a GPU yet"
        if not allows_untested_vllm(environ):
            raise UnsupportedError(
                f"{found}; set {ALLOW_UNTESTED_VLLM}=1 to try it, or start without --kv-compression"
            )
        log_once(logging.WARNING, f"{found}; continuing because {ALLOW_UNTESTED_VLLM} is set.")
    if worker_cls not in WORKERS:
        raise UnsupportedError(
            f"KV compression has no worker for {worker_cls!r}; it runs with {sorted(WORKERS)}; "
            "leave --worker-cls unset if you have set it, or start without --kv-compression"
        )
    return WORKERS[worker_cls]
