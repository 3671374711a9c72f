"""The block pool of one GPU, counted: bytes of weights, bytes of a block, blocks of a request.

Rounds come from the project's own policy; the grouping of layers follows vLLM's
(``_get_kv_cache_groups_uniform_page_size``), and tests compare both with a running engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from triattention_vllm.errors import UnsupportedError
from triattention_vllm.method.policy import Policy, ceil_div, ceil_to_block
from triattention_vllm.tools.model_shape import (
    ITEM_BYTES,
    LinearState,
    ModelShape,
    Parameters,
    stages,
)

# Bits of a number in (linear layers, experts, everything else); None: the model's own dtype.
# 4 + 20/128: a 16-bit scale and a 4-bit zero point for each group of 128, as AWQ and GPTQ store.
# 4 + 8/32: an 8-bit scale for each 32.
WEIGHT_BITS: dict[str, tuple[float | None, float | None, float | None]] = {
    **{name: (8.0 * size,) * 3 for name, size in ITEM_BYTES.items()},
    "fp8": (8.0, 8.0, None),
    "awq": (4 + 20 / 128, 4 + 20 / 128, None),
    "gptq": (4 + 20 / 128, 4 + 20 / 128, None),
    "mxfp4": (None, 4 + 8 / 32, None),
    "4bit": (4.0, 4.0, 4.0),
}


@dataclass(frozen=True)
class Deployment:
    """How a model is laid out. weights_dtype: a key of WEIGHT_BITS; dtype: what is not quantised;
    kv_item_bytes: bytes of a number in the KV cache."""

    tensor_parallel: int
    pipeline_parallel: int
    weights_dtype: str
    dtype: str
    kv_item_bytes: int
    block_size: int


def weight_bytes(parameters: Parameters, deployment: Deployment) -> int:
    """Bytes of these parameters before tensor parallelism divides them."""
    own = 8.0 * ITEM_BYTES[deployment.dtype]
    counts = (parameters.linear, parameters.experts, parameters.other)
    bits = WEIGHT_BITS[deployment.weights_dtype]
    return round(sum(n * (own if b is None else b) for n, b in zip(counts, bits, strict=True)) / 8)


Kind: TypeAlias = int | LinearState | None


@dataclass(frozen=True)
class Group:
    """Layers that share a row of blocks per request. kind: as in ``ModelShape.windows``."""

    kind: Kind
    layer_indices: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A model on its GPUs. groups: of the whole model. block_size: tokens; larger than asked for
    where a linear-attention state has to fit into a block. weights, block_bytes: on one GPU of
    each pipeline stage.
    """

    groups: tuple[Group, ...]
    block_size: int
    weights: tuple[int, ...]
    block_bytes: tuple[int, ...]

    def num_blocks(self, kv_bytes: Sequence[int]) -> int:
        """Blocks of the pool for these bytes on each stage: all ranks have as many."""
        return min(own // block for own, block in zip(kv_bytes, self.block_bytes, strict=True))

    @property
    def bytes_per_token(self) -> int:
        """KV bytes that one more token takes on one GPU (the fullest stage) under full attention,
        in the layers that grow with it."""
        growing = sum(group.kind is None for group in self.groups)
        return growing * max(self.block_bytes) // self.block_size


def group_layers(windows: Sequence[Kind]) -> tuple[Group, ...]:
    """vLLM's grouping: layers of a kind are dealt out to groups of one size, so that blocks of
    all groups take the same bytes."""
    kinds = list(dict.fromkeys(windows))
    counts = [windows.count(kind) for kind in kinds]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for kind, count in zip(kinds, counts, strict=True):
        layers = [layer_idx for layer_idx, own in enumerate(windows) if own == kind]
        num_groups = ceil_div(count, size)
        groups += [Group(kind, tuple(layers[first::num_groups])) for first in range(num_groups)]
    return tuple(groups)


def lay_out(model: ModelShape, deployment: Deployment) -> Layout:
    """The model on its GPUs; raises UnsupportedError where heads or layers do not divide."""
    parallel = deployment.tensor_parallel
    if model.num_kv_heads % parallel and parallel % model.num_kv_heads:
        raise UnsupportedError(
            f"{model.num_kv_heads} KV heads cannot be split over {parallel} tensor-parallel ranks; "
            f"use a divisor or a multiple of {model.num_kv_heads}."
        )
    num_kv_heads = max(1, model.num_kv_heads // parallel)
    token_bytes = 2 * num_kv_heads * model.head_dim * deployment.kv_item_bytes
    block_size = deployment.block_size
    for kind in set(model.windows):
        if isinstance(kind, LinearState):
            smallest = ceil_div(_state_bytes(kind, deployment), token_bytes)
            block_size = max(block_size, ceil_to_block(smallest, 16))
    groups = group_layers(model.windows)
    dealt = stages(model.num_layers, deployment.pipeline_parallel)
    return Layout(
        groups=groups,
        block_size=block_size,
        weights=tuple(
            _stage_weights(model, deployment, layers, stage_idx) // parallel
            for stage_idx, layers in enumerate(dealt)
        ),
        block_bytes=tuple(
            max(len(set(group.layer_indices) & set(layers)) for group in groups)
            * token_bytes
            * block_size
            for layers in dealt
        ),
    )


def _stage_weights(model: ModelShape, deployment: Deployment, layers: range, stage_idx: int) -> int:
    """Bytes of a stage's weights over all its tensor-parallel ranks."""
    parts = sum((model.layer_parameters[layer_idx] for layer_idx in layers), Parameters())
    if stage_idx == 0:
        parts += model.embedding
    if stage_idx == deployment.pipeline_parallel - 1:
        parts += model.head
        if stage_idx > 0:
            parts += Parameters(other=model.tied_head)
    return weight_bytes(parts, deployment)


def _state_bytes(state: LinearState, deployment: Deployment) -> int:
    """Bytes of one layer's state on one rank."""
    own = ITEM_BYTES[deployment.dtype]
    recurrent = own if state.recurrent_dtype is None else ITEM_BYTES[state.recurrent_dtype]
    total = state.conv_elements * own + state.recurrent_elements * recurrent
    return total // deployment.tensor_parallel


def request_blocks(
    layout: Layout, num_tokens: int, policy: Policy | None, num_in_flight: int = 1
) -> int:
    """Most blocks of the pool that a request of up to ``num_tokens`` tokens holds at once, over
    all groups. policy: None is full attention. num_in_flight: tokens scheduled and not yet
    committed, 1 while decoding; with that the server's start-up line says the same."""
    return sum(
        _group_blocks(layout.block_size, group.kind, num_tokens, policy, num_in_flight)
        for group in layout.groups
    )


def _group_blocks(
    block_size: int, kind: Kind, num_tokens: int, policy: Policy | None, num_in_flight: int
) -> int:
    full = ceil_div(num_tokens, block_size)
    if isinstance(kind, LinearState):
        return 1
    if kind is not None:
        # The window may begin inside a block: vLLM's max_admission_blocks_per_request.
        return min(full, ceil_div(kind - 1 + num_in_flight, block_size) + 1)
    bound = None if policy is None else policy.max_cached_tokens(num_in_flight)
    return full if bound is None else min(full, ceil_div(bound, block_size))


def longest_request(layout: Layout, num_blocks: int) -> int:
    """Tokens at which one request of full attention fills ``num_blocks``."""
    shortest, longest = 0, num_blocks
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if request_blocks(layout, middle * layout.block_size, None) <= num_blocks:
            shortest = middle
        else:
            longest = middle - 1
    return shortest * layout.block_size
