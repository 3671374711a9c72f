"""A group's KV cache as strided views of all its layers: keys and values by token."""

from collections.abc import Sequence

from torch import Tensor
from triattention_kernels import ArgumentError, PagedKV, stack_layers
from vllm.model_executor.layers.attention import Attention

from triattention_vllm.engine.differences import BLOCKS_ARE_SPLIT_IN_GROUPS
from triattention_vllm.engine.stored_kv import StoredKV
from triattention_vllm.errors import UnsupportedError


def paged_kv(layers: Sequence[Attention], block_size: int) -> PagedKV:
    """Views of all layers' caches, each bound as [num_blocks, heads, block_size, content], without
    a copy; their layout is the backend's (``StoredKV``).

    The layers may lie anywhere; vLLM's are equally spaced in one storage, which the torch triads
    take at once (``differences.with_one_allocation``).
    block_size: of the KV-cache manager. Where the backend's kernels take smaller blocks, vLLM
    splits each of the manager's and binds views of kernel blocks: block b is then the kernel
    blocks ``b * k`` to ``b * k + k - 1``, with ``k = block_size / kv.block_size``.
    Raises UnsupportedError for a layout that is not known to be read exactly.
    """
    backend = layers[0].get_attn_backend()
    if not issubclass(backend, StoredKV):
        raise UnsupportedError(
            f"the layout of attention backend {backend.get_name()} is not known; choose another "
            "with --attention-backend, or start without --kv-compression"
        )
    kv = PagedKV.joined([backend.paged_kv(stack, layers[0]) for stack in _stacks(layers)])
    if kv.block_size != block_size and not BLOCKS_ARE_SPLIT_IN_GROUPS:
        raise UnsupportedError(
            f"the attention backend reads blocks of {kv.block_size} tokens and the KV cache is "
            f"managed in blocks of {block_size}, which needs vLLM 0.32; set --block-size so that "
            "both agree"
        )
    return kv


def _stacks(layers: Sequence[Attention]) -> list[Tensor]:
    """[L_i, num_blocks, heads, block_size, content], views of all layers' caches."""
    try:
        return stack_layers([layer.kv_cache for layer in layers])
    except ArgumentError as error:
        raise UnsupportedError(
            f"the KV caches of {len(layers)} layers are not alike ({error}); this model cannot be "
            "compressed yet, start without --kv-compression"
        ) from error
