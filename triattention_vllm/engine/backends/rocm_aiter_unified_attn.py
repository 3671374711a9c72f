"""``ROCM_AITER_UNIFIED_ATTN``: vLLM's backend, everything of it, on shifted rows."""

import torch
from vllm.v1.attention.backends.rocm_aiter_unified_attn import (
    RocmAiterUnifiedAttentionBackend,
    RocmAiterUnifiedAttentionImpl,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.stored_kv import StoredKV, one_fp8_only

# Through 0.28 the backend has no builder class of its own and takes that of ROCM_ATTN.
_Builder = RocmAiterUnifiedAttentionBackend.get_builder_cls()


class CompressedAiterUnifiedMetadataBuilder(ShiftedRows, _Builder):  # type: ignore[misc, valid-type]
    """Builds from rows without their null head, for compressed groups only."""


class ObservedAiterUnifiedImpl(ObservedQueries, RocmAiterUnifiedAttentionImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedAiterUnifiedBackend(StoredKV, RocmAiterUnifiedAttentionBackend):
    """vLLM's ``ROCM_AITER_UNIFIED_ATTN`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[RocmAiterUnifiedAttentionImpl]:
        return ObservedAiterUnifiedImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedAiterUnifiedMetadataBuilder]:
        return CompressedAiterUnifiedMetadataBuilder

    @classmethod
    def fp8_dtype(cls, cache_dtype: str) -> torch.dtype:
        """One of fp8's two names is known to be written and read alike."""
        return one_fp8_only(cache_dtype)
