"""The Triton moves, bit for bit: against torch, and against moves made with Python lists."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import LAYOUTS, bits, padded, random_kept
from torch import Tensor
from triattention_kernels import (
    PagedKV,
    RoundBatch,
    compact,
    compact_torch,
    fill_holes,
    moves_forward,
)
from triton_runs import run_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def whole_storage(tensor: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def assert_moves_as_torch(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """Every element of the storage, also those that must stay, has torch's bits."""
    _, arguments = run_triton("triattention_kernels:compact", kv, batch, kept, "triton")
    found = arguments[0]
    compact_torch.compact(kv, batch, kept)
    for moved, expected in ((found.keys, kv.keys), (found.values, kv.values)):
        assert moved.stride() == expected.stride()
        assert torch.equal(whole_storage(moved), whole_storage(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_dtype_moves_bit_exactly(layout, dtype, make_cache, make_batch):
    for sources, destinations in (
        ([[4, 1, 3]], [[1, 3]]),  # own blocks at other places
        ([[4, 1, 3], [6, 5]], [[4, 7], [6]]),  # in place and private
    ):
        cache = make_cache(layout, (2, 8, 2, 32, 32), dtype)
        batch = make_batch(sources, destinations, [0] * len(sources))
        batch = replace(batch, moves_forward=moves_forward(sources, destinations))
        assert_moves_as_torch(cache.kv, batch, random_kept(batch, 2, 2, 32))


@pytest.mark.parametrize("layout", ["head_major", "vec"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 1), (3, 4, 1, 3, 5), (1, 3, 5, 7, 2)])
@pytest.mark.parametrize("in_place", [False, True])
def test_odd_sizes_and_size_one_are_moved(layout, shape, in_place, make_cache, make_batch):
    sources = [list(range(1, shape[1]))]
    destinations = [sources[0][:1]] if in_place else [sources[0][-1:]]
    batch = replace(make_batch(sources, destinations, [0]), moves_forward=in_place)
    kept = random_kept(batch, shape[0], shape[2], shape[3])
    assert_moves_as_torch(make_cache(layout, shape).kv, batch, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("forward", [False, True])
def test_tokens_packed_for_rocm_are_moved(dtype, forward, make_batch):
    generator = torch.Generator().manual_seed(8)
    storage = torch.randint(0, 256, (2, 8, 2, 16, 64), generator=generator).to(dtype)
    kv = PagedKV.from_rocm_layout(storage, 2)
    batch = make_batch([[4, 1, 3], [6, 5]], [[4, 7], [6]] if forward else [[1, 4], [3]], [0, 0])
    assert_moves_as_torch(kv, replace(batch, moves_forward=forward), random_kept(batch, 2, 2, 16))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_dim_is_moved(head_dim, make_cache, make_batch):
    cache = make_cache("token_major", (1, 9, 2, 16, head_dim), torch.bfloat16)
    batch = make_batch([[4, 1, 3, 8, 2, 6]], [[4, 1, 7, 8]], [0])
    kept = random_kept(batch, 1, 2, 16)
    assert_moves_as_torch(cache.kv, replace(batch, moves_forward=True), kept)


def test_survivors_slide_forward_by_hand(make_batch):
    blocks = torch.arange(8.0).view(1, 4, 1, 2, 1).repeat(1, 1, 1, 1, 2)  # key = value = token
    blocks[..., 1] += 100
    batch = replace(make_batch([[1, 2, 3]], [[1, 2]], [0]), moves_forward=True)
    kept = torch.tensor([0, 3, 4, 5]).view(1, 1, 1, 4)
    kv = PagedKV.from_blocks(blocks)
    _, (found, _, _, _) = run_triton("triattention_kernels:compact", kv, batch, kept, "triton")
    assert found.keys.flatten().tolist() == [0, 1, 2, 5, 6, 7, 6, 7]
    assert found.values.flatten().tolist() == [100, 101, 102, 105, 106, 107, 106, 107]


def test_every_read_comes_before_the_first_write(make_cache, make_batch):
    """Each request writes into blocks that another request of the batch reads."""
    cache = make_cache("amx", (2, 8, 2, 16, 16), torch.bfloat16)
    batch = make_batch([[1, 2], [3, 4], [5, 6, 7]], [[3, 5], [7], [2, 1]], [0, 0, 0])
    assert_moves_as_torch(cache.kv, batch, random_kept(batch, 2, 2, 16))


@pytest.mark.parametrize("offset", range(5))
def test_a_cache_may_start_anywhere_in_its_storage(offset, make_batch):
    """Neighbouring elements are moved together only where alignment allows."""
    storage = torch.arange(offset + 4 * 2 * 8, dtype=torch.int16)
    kv = PagedKV.from_blocks(storage[offset:].view(1, 4, 1, 2, 8))
    batch = make_batch([[1, 2]], [[3]], [0])
    assert_moves_as_torch(kv, batch, torch.tensor([1, 2]).view(1, 1, 1, 2))


def test_many_tiles_slide_over_each_other(make_cache, make_batch):
    """A row of some ten tiles, moved by less than one tile."""
    cache = make_cache("head_major", (1, 80, 1, 16, 256), torch.float32)
    batch = make_batch([list(range(1, 76))], [list(range(1, 71))], [0])
    kept = random_kept(batch, 1, 1, 16)
    assert_moves_as_torch(cache.kv, replace(batch, moves_forward=True), kept)


def test_a_keep_set_that_layers_and_heads_share_is_read_as_one(make_cache, make_batch):
    cache = make_cache("head_major", (2, 8, 2, 16, 16))
    batch = replace(make_batch([[4, 1, 3]], [[4, 1]], [0]), moves_forward=True)
    kept = random_kept(batch, 1, 1, 16).expand(1, 2, 2, 32)
    assert_moves_as_torch(cache.kv, batch, kept)


def test_hole_filling_moves_as_torch_does(make_cache, make_batch):
    cache = make_cache("token_major", (2, 12, 2, 16, 32), torch.bfloat16)
    sources, destinations = [[4, 1, 3, 5], [6, 8, 2]], [[4, 10, 3], [6, 8]]
    batch = make_batch(sources, destinations, [3, 0])
    order = fill_holes(random_kept(batch, 2, 2, 16), batch, 16)
    assert_moves_as_torch(cache.kv, replace(batch, moves_forward=True), order)


@settings(max_examples=25)
@given(data=st.data())
def test_any_forward_batch_moves_as_with_lists(data):
    num_requests = data.draw(st.integers(1, 3), "num_requests")
    counts = [data.draw(st.integers(1, 3), "num_source") for _ in range(num_requests)]
    order = data.draw(st.permutations(range(1, 19)), "order")
    sources = [order[sum(counts[:r]) : sum(counts[: r + 1])] for r in range(num_requests)]
    free = order[sum(counts) :]
    destinations = [
        [block if data.draw(st.booleans(), "in_place") else free.pop() for block in row[:count]]
        for row in sources
        for count in [data.draw(st.integers(1, len(row)), "num_destination")]
    ]
    assert moves_forward(sources, destinations)

    batch = RoundBatch(
        padded(sources),
        padded(destinations),
        tuple(map(len, sources)),
        tuple(map(len, destinations)),
        (0,) * num_requests,
        moves_forward=True,
    )
    kept = random_kept(batch, 2, 1, 3)
    before = torch.arange(2 * 19 * 3 * 4).view(2, 19, 1, 3, 4)
    expected = before.tolist()
    for r, layer in [(r, layer) for r in range(num_requests) for layer in range(2)]:
        for slot in range(len(destinations[r]) * 3):
            token = int(kept[r, layer, 0, slot])
            row = before[layer, sources[r][token // 3], 0, token % 3].tolist()
            expected[layer][destinations[r][slot // 3]][0][slot % 3] = row
    kv = PagedKV.from_blocks(before.float())
    _, (found, _, _, _) = run_triton("triattention_kernels:compact", kv, batch, kept, "triton")
    assert torch.cat([found.keys, found.values], dim=5)[:, :, :, :, 0, :, 0].tolist() == expected


def test_nothing_is_promised_for_a_batch_by_itself(make_batch):
    assert not make_batch([[1]], [[1]], [0]).moves_forward


def test_triton_on_the_cpu_is_refused_and_never_replaced(make_cache, make_batch, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cache = make_cache("head_major", (1, 3, 1, 2, 4))
    before = bits(cache.blocks)
    batch, kept = make_batch([[1, 2]], [[1]], [0]), torch.tensor([1, 3]).view(1, 1, 1, 2)
    with pytest.raises(ValueError, match='implementation="triton" was asked for tensors on cpu'):
        compact(cache.kv, batch, kept, "triton")
    assert torch.equal(bits(cache.blocks), before)
