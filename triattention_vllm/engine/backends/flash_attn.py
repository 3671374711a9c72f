"""``FLASH_ATTN``: vLLM's backend, its name and everything else of it, on shifted rows."""

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.stored_kv import StoredKV


class CompressedFlashAttentionMetadataBuilder(ShiftedRows, FlashAttentionMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""


class ObservedFlashAttentionImpl(ObservedQueries, FlashAttentionImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedFlashAttentionBackend(StoredKV, FlashAttentionBackend):
    """vLLM's ``FLASH_ATTN`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return ObservedFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return CompressedFlashAttentionMetadataBuilder
