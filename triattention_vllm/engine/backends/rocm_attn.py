"""``ROCM_ATTN``: vLLM's backend, its name and everything else of it, on shifted rows."""

import torch
from torch import Tensor
from triattention_kernels import PagedKV
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.rocm_attn import (
    RocmAttentionBackend,
    RocmAttentionImpl,
    RocmAttentionMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.stored_kv import StoredKV, one_fp8_only
from triattention_vllm.errors import UnsupportedError


class CompressedRocmMetadataBuilder(ShiftedRows, RocmAttentionMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""


class ObservedRocmImpl(ObservedQueries, RocmAttentionImpl):
    """The implementation; calibration may look at the queries of a plain run."""

    def set_interleaved_v_cache(self) -> None:
        """vLLM 0.33 calls this where a fused kernel of AITER writes the cache, before it does."""
        raise UnsupportedError(
            "the fused RoPE and KV cache writer of AITER stores several tokens' values mixed; "
            "choose another --attention-backend, or start without --kv-compression"
        )


class CompressedRocmBackend(StoredKV, RocmAttentionBackend):
    """vLLM's ``ROCM_ATTN`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[RocmAttentionImpl]:
        return ObservedRocmImpl

    @staticmethod
    def get_builder_cls() -> type[RocmAttentionMetadataBuilder]:
        return CompressedRocmMetadataBuilder

    @classmethod
    def fp8_dtype(cls, cache_dtype: str) -> torch.dtype:
        """One of fp8's two names is known to be written and read alike."""
        return one_fp8_only(cache_dtype)

    @classmethod
    def paged_kv(cls, blocks: Tensor, layer: Attention) -> PagedKV:
        """All keys of a block, then all its values, each packed for the matrix units.

        Source: ``PagedAttention.split_kv_cache``.
        """
        return PagedKV.from_rocm_layout(cls.numbers(blocks, layer), layer.num_kv_heads)
