"""The one start-up line: what is on and what it buys."""

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheConfig

from triattention_vllm.config import Settings
from triattention_vllm.engine.spec import blocks_without_compression, compressed_spec


def startup_line(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    settings: Settings,
    statistics: str,
) -> str:
    """Budget, statistics source, blocks per request, and requests that fit with and without.

    "Fit" counts decoding requests of ``max_model_len`` tokens in the pool (one block is vLLM's
    null block): each holds budget + interval tokens at most in every compressed KV-cache group,
    and in every other group what vLLM reckons with. While a prompt is prefilled its in-flight
    chunk comes on top.
    """
    max_len = vllm_config.model_config.max_model_len
    full = decode = prefill = 0
    num_groups, sizes = 0, set[int]()
    for group in kv_cache_config.kv_cache_groups:
        spec = compressed_spec(group)
        if spec is None:
            other = blocks_without_compression(group.kv_cache_spec, vllm_config)
            full, decode, prefill = full + other, decode + other, prefill + other
            continue
        num_groups, sizes = num_groups + 1, sizes | {spec.block_size}
        whole = cdiv(max_len, spec.block_size)
        decode_tokens = spec.policy.max_cached_tokens(1)
        full += whole
        decode += (
            whole if decode_tokens is None else min(whole, cdiv(decode_tokens, spec.block_size))
        )
        prefill += min(whole, spec.max_blocks_per_request(spec.policy) or whole)
    usable = kv_cache_config.num_blocks - 1
    groups = len(kv_cache_config.kv_cache_groups)
    scope = "" if groups == 1 else f" in {num_groups} of {groups} KV cache groups"
    return (
        f"KV compression is on{scope}: {settings.method}, budget {settings.budget} tokens, "
        f"a round every {settings.interval}, selection {settings.selection}, redundancy "
        f"{settings.redundancy} percent, protecting {settings.protect}; statistics: {statistics}. "
        f"A request holds at most {decode} blocks of {', '.join(map(str, sorted(sizes)))} tokens "
        f"while decoding ({prefill} while prefilling) instead of {full}; the pool of {usable} "
        f"blocks holds {usable // decode} requests of {max_len} tokens, {usable // full} without "
        "compression."
    )
