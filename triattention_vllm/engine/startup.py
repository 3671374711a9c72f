"""The one start-up line: what is on and what it buys."""

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheConfig

from triattention_vllm.config import Settings
from triattention_vllm.engine.spec import compressed_spec


def startup_line(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    settings: Settings,
    statistics: str,
) -> str:
    """Budget, statistics source, blocks per request, and requests that fit with and without.

    "Fit" counts decoding requests of ``max_model_len`` tokens in the pool (one block is vLLM's
    null block): each holds budget + interval tokens at most. While a prompt is prefilled its
    in-flight chunk comes on top.
    """
    spec = next(filter(None, map(compressed_spec, kv_cache_config.kv_cache_groups)))
    max_len = vllm_config.model_config.max_model_len
    full = cdiv(max_len, spec.block_size)
    decode_tokens = spec.policy.max_cached_tokens(1)
    decode = full if decode_tokens is None else min(full, cdiv(decode_tokens, spec.block_size))
    prefill = min(full, spec.max_blocks_per_request(spec.policy) or full)
    usable = kv_cache_config.num_blocks - 1
    return (
        f"KV compression is on: {settings.method}, budget {settings.budget} tokens, "
        f"a round every {settings.interval}, selection {settings.selection}, protecting "
        f"{settings.protect}; statistics: {statistics}. A request holds at most {decode} blocks "
        f"of {spec.block_size} tokens while decoding ({prefill} while prefilling) instead of "
        f"{full}; the pool of {usable} blocks holds {usable // decode} requests of "
        f"{max_len} tokens, {usable // full} without compression."
    )
