"""``CPU_ATTN``: vLLM's backend, its name and everything else of it, on shifted rows."""

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows


class CompressedCPUMetadataBuilder(ShiftedRows, CPUAttentionMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""


class ObservedCPUImpl(ObservedQueries, CPUAttentionBackendImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedCPUBackend(CPUAttentionBackend):
    """vLLM's ``CPU_ATTN`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ObservedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CompressedCPUMetadataBuilder
