"""Random paged caches in every layout, and their contents read by offset arithmetic."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from kernel_inputs import padded
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

# Products on a GPU have a fixed result only with this, which is read at the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Cache:
    """``blocks`` is the storage as [L, num_blocks, H_kv, block_size, 2 * D]; ``kv`` views it."""

    layout: str
    blocks: Tensor
    kv: PagedKV

    def dense(self) -> tuple[Tensor, Tensor]:
        """Copies of keys and values, [L, num_blocks, H_kv, block_size, D], by offsets alone."""
        block_size, head_dim = self.blocks.shape[3], self.blocks.shape[4] // 2
        flat = self.blocks.flatten(3)
        if flat.itemsize == 1:
            flat = flat.view(torch.uint8)  # torch indexes no fp8
        found = []
        for is_value in (False, True):
            offsets = [
                [
                    element_offset(self.layout, is_value, slot, dim, block_size, head_dim)
                    for dim in range(head_dim)
                ]
                for slot in range(block_size)
            ]
            found.append(flat[..., torch.tensor(offsets)].view(self.blocks.dtype))
        return found[0], found[1]


def element_offset(
    layout: str, is_value: bool, slot: int, dim: int, block_size: int, head_dim: int
) -> int:
    """Where one element lies among the ``block_size * 2 * head_dim`` of its block and head."""
    if layout in ("head_major", "token_major"):
        return slot * 2 * head_dim + is_value * head_dim + dim
    if layout == "vec":
        return (block_size + slot) * head_dim + dim if is_value else dim * block_size + slot
    if is_value:
        group = dim // 16 * (block_size // 2) + slot // 2
        return block_size * head_dim + group * 32 + dim % 16 * 2 + slot % 2
    return (slot // 16 * (head_dim // 2) + dim // 2) * 32 + slot % 16 * 2 + dim % 2


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, and an operation without a fixed result raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MakeCache = Callable[..., Cache]
MakeBatch = Callable[..., RoundBatch]


@pytest.fixture
def make_cache() -> MakeCache:
    """A cache of random content whose null block (id 0) is poison."""

    def make(
        layout: str,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Cache:
        num_layers, num_blocks, num_kv_heads, block_size, head_dim = shape
        size = [num_layers, num_blocks, num_kv_heads, block_size, 2 * head_dim]
        if layout == "token_major":
            size[2], size[3] = size[3], size[2]
        generator = torch.Generator().manual_seed(seed)
        if dtype.is_floating_point:
            content = torch.randn(size, generator=generator)
            content[:, 0] = torch.nan
            storage = content.to(dtype)
        else:
            storage = torch.randint(0, 256, size, generator=generator).to(dtype)
        if layout == "head_major":
            return Cache(layout, storage, PagedKV.from_blocks(storage))
        if layout == "token_major":
            blocks = storage.transpose(2, 3)
            return Cache(layout, blocks, PagedKV.from_blocks(blocks))
        assert layout in ("vec", "amx")
        return Cache(layout, storage, PagedKV.from_cpu_layout(storage, layout))

    return make


@pytest.fixture
def make_batch() -> MakeBatch:
    """A RoundBatch from lists of block ids, rows padded with 0."""

    def make(
        source: list[list[int]], destination: list[list[int]], first_candidate: list[int]
    ) -> RoundBatch:
        return RoundBatch(
            source_blocks=padded(source),
            destination_blocks=padded(destination),
            num_source_blocks=tuple(len(row) for row in source),
            num_destination_blocks=tuple(len(row) for row in destination),
            first_candidate=tuple(first_candidate),
        )

    return make
