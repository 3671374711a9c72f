"""``TRITON_ATTN``: vLLM's backend, its name and everything else of it, on shifted rows."""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.stored_kv import StoredKV


class CompressedTritonMetadataBuilder(ShiftedRows, TritonAttentionMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""


class ObservedTritonImpl(ObservedQueries, TritonAttentionImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedTritonBackend(StoredKV, TritonAttentionBackend):
    """vLLM's ``TRITON_ATTN`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return ObservedTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return CompressedTritonMetadataBuilder
