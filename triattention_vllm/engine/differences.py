"""What vLLM's release lines do differently, each behind a function of one meaning.

Every comparison with a version of vLLM is in this file. A branch goes when ``VERIFIED`` in
``versions`` no longer holds a line that needs it.
"""

import dataclasses
import itertools

from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

from triattention_vllm.engine.versions import line_of_behaviour, vllm_version

LINE = line_of_behaviour(vllm_version())

BLOCKS_ARE_SPLIT_IN_GROUPS = LINE >= (0, 32)
"""Where the attention kernel takes smaller blocks than the manager's, whether rows stay in the
manager's blocks and each attention group maps them to kernel blocks (``AttentionGroup``); before,
the runner's rows were in kernel blocks already."""

CPU_BUILD_VERIFIES_DRAFTS = LINE != (0, 30)
"""Whether speculative decoding runs on the CPU. 0.30's CPU build puts its own functions in place
of the rejection sampler's Triton kernels by name, and the sampler calls those that it already
holds: the first draft ends the engine, with compression or without."""

TRANSFORMERS_LAYERS_ARE_IN_THE_TREE = LINE >= (0, 30)
"""Whether vLLM's Transformers backend puts its attention layers into the model's module tree, where
the rotary module beside each is found; before, it kept them in a dictionary of its own."""

STAGED_WRITES_GROW = LINE >= (0, 30)
"""Whether model runner V2 takes more writes into its rows in a step than it has requests. Before, a
step with a round for every request, each of which also gets a block, ended it."""

RUNNER_V2_KNOWS_THE_CPU = LINE >= (0, 32)
"""Whether model runner V2 has been seen to compress on a CPU."""

JIT_MONITOR_CAN_WAIT = LINE >= (0, 31)
"""Whether the CUDA worker turns vLLM's monitor of kernel compilations on in a method of its own,
which ours calls behind its own warm-up; before, that warm-up is reported (``--jit-monitor-mode
warn``) or refused (``error``)."""


def is_block_writable(pool: BlockPool, block: KVCacheBlock) -> bool:
    """Whether ``block`` has one owner and no prefix-cache hash, so that it may be refilled.

    ``BlockPool.is_block_writable`` is new in 0.29; before it, the same rule.
    """
    if LINE < (0, 29):
        return not block.is_null and block.ref_cnt == 1 and block.block_hash is None
    return bool(pool.is_block_writable(block))


def bound_admission(manager: FullAttentionManager, max_blocks: int | None) -> None:
    """Let ``manager`` count at most ``max_blocks`` for the request that it is asked about next;
    None leaves it unbounded. The attribute is private through 0.30."""
    if LINE < (0, 31):
        manager._max_admission_blocks_per_request = max_blocks
    else:
        manager.max_admission_blocks_per_request = max_blocks


def cpu_packing(layer: Attention) -> str:
    """The instruction set that vLLM's CPU attention packs the layer's blocks for.

    Through 0.28 the attention implementation knows it; since 0.29 it is set on the layer.
    """
    return str(layer.impl.isa if LINE < (0, 29) else layer.isa)


def with_one_allocation(config: KVCacheConfig) -> KVCacheConfig:
    """``config`` with the caches of all layers in one allocation, at equal spacing, so that one
    strided view covers the layers of a group.

    Since 0.29 vLLM allocates so. 0.28 allocates layer by layer, unless the configuration says
    that a block holds the pages of all layers (its "packed" layout). Its Mamba layers do not
    know that layout, so a model that has some keeps its layers apart.
    """
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    tensors = config.kv_cache_tensors
    packed = any(tensor.block_stride for tensor in tensors)
    if LINE >= (0, 29) or packed or any(isinstance(spec, MambaSpec) for spec in specs):
        return config
    pages = [tensor.size // config.num_blocks for tensor in tensors]
    stride = sum(pages)
    starts = itertools.accumulate(pages, initial=0)
    return dataclasses.replace(
        config,
        kv_cache_tensors=[
            dataclasses.replace(
                tensor, size=stride * config.num_blocks, offset=start, block_stride=stride
            )
            for tensor, start in zip(tensors, starts, strict=False)
        ],
    )
