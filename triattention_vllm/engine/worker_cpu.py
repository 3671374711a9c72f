"""vLLM's CPU worker that compresses; imported in processes that run on a CPU and nowhere else.

vLLM's CPU worker puts placeholders in the place of torch's CUDA events, streams and pinned memory
when it is imported, so an engine on a GPU must never import it.
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from triattention_vllm.engine.worker import CompressionWorker


class CompressionCPUWorker(CompressionWorker, CPUWorker):
    """``CPUWorker`` that compresses."""

    def __init__(self, vllm_config: VllmConfig, *args: object, **kwargs: object) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        if torch.cpu._is_amx_tile_supported():
            # vLLM skips its warm-up in eager mode, and a first batch of one bfloat16 token then
            # ends in an illegal instruction.
            torch.cpu._init_amx()
