"""``CPU_ATTN``: vLLM's backend, its name and everything else of it, on shifted rows."""

import torch
from torch import Tensor
from triattention_kernels import PagedKV
from triattention_kernels.paged import CpuLayout
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.differences import cpu_packing
from triattention_vllm.engine.stored_kv import StoredKV, fp8_by_name
from triattention_vllm.errors import UnsupportedError

CPU_LAYOUTS: dict[str, CpuLayout] = {"vec": "vec", "vec16": "vec16", "amx": "amx"}
"""Packing inside a block by the instruction set that vLLM's CPU backend chose."""


class CompressedCPUMetadataBuilder(ShiftedRows, CPUAttentionMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""


class ObservedCPUImpl(ObservedQueries, CPUAttentionBackendImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedCPUBackend(StoredKV, CPUAttentionBackend):
    """vLLM's ``CPU_ATTN`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ObservedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CompressedCPUMetadataBuilder

    @classmethod
    def fp8_dtype(cls, cache_dtype: str) -> torch.dtype:
        """Source: vLLM csrc/cpu/cpu_attn_fp8.hpp (``select_fp8_quant_fn``)."""
        return fp8_by_name(cache_dtype)

    @classmethod
    def paged_kv(cls, blocks: Tensor, layer: Attention) -> PagedKV:
        """Packed by instruction set inside a block; fp8 bytes lie where the numbers of the
        model's dtype would."""
        isa = cpu_packing(layer)
        if isa not in CPU_LAYOUTS:
            raise UnsupportedError(
                f"the CPU attention backend packs its KV cache for {isa!r}; this package reads "
                f"{sorted(CPU_LAYOUTS)}; run on an x86 machine or without --kv-compression"
            )
        return PagedKV.from_cpu_layout(cls.numbers(blocks, layer), CPU_LAYOUTS[isa])
