"""``ROCM_AITER_FA``: vLLM's backend, its name and everything else of it, on shifted rows."""

from typing import Any

import torch
from torch import Tensor
from triattention_kernels import PagedKV
from vllm._aiter_ops import rocm_aiter_ops
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.rocm_aiter_fa import (
    AiterFlashAttentionBackend,
    AiterFlashAttentionImpl,
    AiterFlashAttentionMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.spec import CompressedAttentionSpec
from triattention_vllm.engine.stored_kv import StoredKV, one_fp8_only
from triattention_vllm.errors import UnsupportedError


class CompressedAiterMetadataBuilder(ShiftedRows, AiterFlashAttentionMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> Any:
        """vLLM's own goes around ``build``, so the rows are shifted here."""
        if isinstance(self.kv_cache_spec, CompressedAttentionSpec):
            common_attn_metadata = self._shifted(common_attn_metadata)
        return super().build_for_drafting(common_attn_metadata, draft_index)


class ObservedAiterImpl(ObservedQueries, AiterFlashAttentionImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedAiterBackend(StoredKV, AiterFlashAttentionBackend):
    """vLLM's ``ROCM_AITER_FA`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[AiterFlashAttentionImpl]:
        return ObservedAiterImpl

    @staticmethod
    def get_builder_cls() -> type[AiterFlashAttentionMetadataBuilder]:
        return CompressedAiterMetadataBuilder

    @classmethod
    def fp8_dtype(cls, cache_dtype: str) -> torch.dtype:
        """One of fp8's two names is known to be written and read alike."""
        return one_fp8_only(cache_dtype)

    @classmethod
    def paged_kv(cls, blocks: Tensor, layer: Attention) -> PagedKV:
        """A row per token, unless the shuffled layout is on, whose tiles mix tokens."""
        if rocm_aiter_ops.is_shuffle_kv_cache_enabled():
            raise UnsupportedError(
                "the shuffled KV cache of AITER mixes the tokens of a block; unset "
                "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT, or start without --kv-compression"
            )
        return super().paged_kv(blocks, layer)
