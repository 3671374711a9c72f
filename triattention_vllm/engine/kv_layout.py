"""How vLLM lays out a group's KV cache, as strided views: keys and values by token."""

from collections.abc import Sequence

from torch import Tensor
from triattention_kernels import ArgumentError, PagedKV, stack_layers
from triattention_kernels.paged import CpuLayout
from vllm.model_executor.layers.attention import Attention

from triattention_vllm.engine.differences import cpu_packing
from triattention_vllm.errors import UnsupportedError

CPU_LAYOUTS: dict[str, CpuLayout] = {"vec": "vec", "vec16": "vec16", "amx": "amx"}
"""Packing inside a block by the instruction set that vLLM's CPU backend chose."""


def paged_kv(layers: Sequence[Attention], block_size: int) -> PagedKV:
    """Views of all layers' caches, [num_blocks, H_kv, block_size, 2 * D] each, without a copy.

    CUDA backends store a token's key and value side by side in any layout of the other
    dimensions; the CPU backend packs them by instruction set inside a block.

    The layers of a group are equally spaced in one storage (``differences.with_one_allocation``).
    Raises UnsupportedError for a layout that is not known to be read exactly.
    """
    found = {layer.kv_cache.shape[2] for layer in layers}
    if found != {block_size}:
        raise UnsupportedError(
            f"the attention backend reads blocks of {sorted(found)} tokens and the KV cache is "
            f"managed in blocks of {block_size}; set --block-size so that both agree"
        )
    blocks = _stacked(layers)
    if blocks.device.type != "cpu":
        return PagedKV.from_blocks(blocks)
    isa = cpu_packing(layers[0])
    if isa not in CPU_LAYOUTS:
        raise UnsupportedError(
            f"the CPU attention backend packs its KV cache for {isa!r}; this package reads "
            f"{sorted(CPU_LAYOUTS)}; run on an x86 machine or without --kv-compression"
        )
    return PagedKV.from_cpu_layout(blocks, CPU_LAYOUTS[isa])


def _stacked(layers: Sequence[Attention]) -> Tensor:
    """[L, num_blocks, H_kv, block_size, 2 * D], a view of all layers' caches."""
    try:
        return stack_layers([layer.kv_cache for layer in layers])
    except ArgumentError as error:
        raise UnsupportedError(
            f"the KV cache of {len(layers)} layers is not laid out evenly ({error}); this model "
            "cannot be compressed yet, start without --kv-compression"
        ) from error
