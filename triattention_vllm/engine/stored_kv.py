"""How an attention backend stores keys and values, and which KV dtypes can be scored."""

from typing import cast

import torch
from torch import Tensor
from triattention_kernels import PagedKV
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from triattention_vllm.errors import UnsupportedError

KV_DTYPES = (
    "auto",
    "float16",
    "bfloat16",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8_per_token_head",
    "fp8_per_token_head",
)
"""Values of ``--kv-cache-dtype`` whose keys can be scored and moved. The others pack several
numbers into a byte, or rotate keys before they quantise them."""


class StoredKV:
    """In front of an attention backend: how its caches are read as keys and values.

    Unless a backend overrides it: a token's key and value side by side in one row, in any order
    of the other dimensions; quantised as vLLM's Triton and FlashAttention kernels do.
    """

    @classmethod
    def fp8_dtype(cls, cache_dtype: str) -> torch.dtype:
        """The numbers that fp8 bytes stand for: the platform's e4m3, whatever fp8 is called.

        Source: ``triton_reshape_and_cache_flash`` and the backends' own views.
        """
        del cache_dtype
        return cast(torch.dtype, current_platform.fp8_dtype())

    @classmethod
    def paged_kv(cls, blocks: Tensor, layer: Attention) -> PagedKV:
        """Views of the layers' caches, stacked as ``blocks`` [L, num_blocks, H_kv, N, content].

        layer: any of the layers, which are alike. Scales of a tensor or head (fp8) are left out:
        they change no ranking. Scales of a token and head are taken along.
        """
        mode = get_kv_quant_mode(layer.kv_cache_dtype)
        if mode == KVQuantMode.INT8_PER_TOKEN_HEAD:
            return PagedKV.from_scaled_blocks(blocks, torch.int8)
        if mode == KVQuantMode.FP8_PER_TOKEN_HEAD:
            return PagedKV.from_scaled_blocks(blocks, cls.fp8_dtype(layer.kv_cache_dtype))
        return PagedKV.from_blocks(cls.numbers(blocks, layer))

    @classmethod
    def numbers(cls, blocks: Tensor, layer: Attention) -> Tensor:
        """The blocks; bytes of fp8 that have no scales of their own as what they stand for."""
        if get_kv_quant_mode(layer.kv_cache_dtype) == KVQuantMode.FP8_PER_TENSOR:
            return blocks.view(cls.fp8_dtype(layer.kv_cache_dtype))
        return blocks


def fp8_by_name(cache_dtype: str) -> torch.dtype:
    """The numbers of backends that store what the KV dtype is called."""
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


def one_fp8_only(cache_dtype: str) -> torch.dtype:
    """The platform's e4m3, of backends whose compiled writers may store another for e5m2."""
    if cache_dtype == "fp8_e5m2":
        raise UnsupportedError(
            "KV dtype 'fp8_e5m2' is read as e4m3 by this attention backend and may be written as "
            "e5m2; set --kv-cache-dtype fp8, or start without --kv-compression"
        )
    return cast(torch.dtype, current_platform.fp8_dtype())
