"""This package's worker for a GPU where the only worker of vLLM that starts is that for a CPU."""

from vllm.v1.worker.cpu_worker import CPUWorker

from triattention_vllm.engine.worker import CompressionGPUWorker


class InterpretedGPUWorker(CompressionGPUWorker, CPUWorker):
    """``CompressionGPUWorker`` in front of ``CPUWorker``."""
