"""Caches whose layers lie in several storages, in another order than the model's.

To be called where the kernels run: distances between storages would not survive a copy.
"""

import torch
from torch import Tensor
from triattention_kernels import (
    Implementation,
    PagedKV,
    Repeats,
    RoundBatch,
    compact,
    score,
    select,
    stack_layers,
)


def scattered_round(
    content: Tensor,
    gap: int | None,
    batch: RoundBatch,
    weights: tuple[Tensor, Tensor, Tensor],
    kept: Tensor,
    implementation: Implementation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a cache, what would be kept of its values alone, and its content after ``kept`` was
    moved.

    content: [L, num_blocks, H_kv, block_size, content]; int8 with scales. gap: bytes between the
    layers; None leaves them equally spaced.
    """
    layers = list(content.clone()) if gap is None else scattered(content, gap)
    views = [
        PagedKV.from_scaled_blocks(stack, content.dtype)
        if content.dtype == torch.int8
        else PagedKV.from_blocks(stack)
        for stack in stack_layers(layers)
    ]
    kv = PagedKV.joined(views)
    assert len(list(kv.evenly_spaced())) == (1 if gap is None else len(layers))
    scores = score(kv, batch, *weights, False, 2 * weights[1].shape[-1], implementation)
    sizes = (kv.block_size, kv.num_kv_heads, "per_layer_per_head")
    chosen = select(torch.zeros_like(scores), batch, *sizes, implementation, Repeats(kv, 1.0))
    compact(kv, batch, kept, implementation)
    return scores, chosen, torch.stack(layers)


def scattered(content: Tensor, gap: int) -> list[Tensor]:
    """Copies of the layers: odd ones behind even ones in a storage of their own, both backwards."""
    layers: list[Tensor] = []
    layer_bytes = content[0].numel() * content.itemsize
    size = len(content) * (layer_bytes + gap)
    storages = [content.new_zeros(size, dtype=torch.uint8) for _ in "ab"]
    for idx, layer in enumerate(content):
        end = (len(content) - idx) * (layer_bytes + gap)
        own = storages[idx % 2][end - layer_bytes : end]
        layers.append(own.view(content.dtype).view(layer.shape))
        layers[-1].view(torch.uint8).copy_(layer.view(torch.uint8))
    return layers
