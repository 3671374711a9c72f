"""How vLLM lays out a group's KV cache, as strided views: keys and values by token."""

from collections.abc import Sequence

from triattention_kernels import PagedKV, stack_layers
from triattention_kernels.paged import CpuLayout
from vllm.model_executor.layers.attention import Attention

from triattention_vllm.errors import UnsupportedError

CPU_LAYOUTS: dict[str, CpuLayout] = {"vec": "vec", "vec16": "vec16", "amx": "amx"}
"""Packing inside a block by the instruction set that vLLM's CPU backend chose."""


def paged_kv(layers: Sequence[Attention]) -> PagedKV:
    """Views of all layers' caches, [num_blocks, H_kv, block_size, 2 * D] each, without a copy.

    The layers of a group are equally spaced in one storage (vLLM's ``create_kv_cache_views``).
    """
    isa = layers[0].isa
    if isa not in CPU_LAYOUTS:
        raise UnsupportedError(
            f"the CPU attention backend packs its KV cache for {isa!r}; this package reads "
            f"{sorted(CPU_LAYOUTS)}; run on an x86 machine or without --kv-compression"
        )
    blocks = stack_layers([layer.kv_cache for layer in layers])
    return PagedKV.from_cpu_layout(blocks, CPU_LAYOUTS[isa])
