"""Moved tokens, bit for bit, against moves made with Python lists."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import LAYOUTS, bits, padded, random_kept
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch, compact, fill_holes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def oracle(
    dense: Tensor,
    sources: Sequence[Sequence[int]],
    destinations: Sequence[Sequence[int]],
    kept: list[list[list[list[int]]]],
) -> list:
    """Contents [L][num_blocks][H_kv][block_size][D] after the moves, one token at a time."""
    block_size = dense.shape[3]
    before, after = bits(dense).tolist(), bits(dense).tolist()
    for r, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        for layer in range(dense.shape[0]):
            for head in range(dense.shape[2]):
                for slot in range(len(destination) * block_size):
                    token = kept[r][layer][head][slot]
                    row = before[layer][source[token // block_size]][head][token % block_size]
                    target = after[layer][destination[slot // block_size]][head]
                    target[slot % block_size] = row
    return after


def assert_moves(cache, make_batch, sources, destinations) -> None:
    kv = cache.kv
    batch = make_batch(sources, destinations, [0] * len(sources))
    kept = random_kept(batch, kv.num_layers, kv.num_kv_heads, kv.block_size)
    expected = [oracle(dense, sources, destinations, kept.tolist()) for dense in cache.dense()]
    assert compact(kv, batch, kept) is None
    assert [bits(dense).tolist() for dense in cache.dense()] == expected


def test_survivors_slide_forward_by_hand(make_batch):
    blocks = torch.arange(8.0).view(1, 4, 1, 2, 1).repeat(1, 1, 1, 1, 2)  # key = value = token
    blocks[..., 1] += 100
    kv = PagedKV.from_blocks(blocks)
    batch = make_batch([[1, 2, 3]], [[2, 3]], [0])
    compact(kv, batch, torch.tensor([0, 3, 4, 5]).view(1, 1, 1, 4))
    assert blocks[0, :, 0, :, 0].tolist() == [[0, 1], [2, 3], [2, 5], [6, 7]]
    assert blocks[0, :, 0, :, 1].tolist() == [[100, 101], [102, 103], [102, 105], [106, 107]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_dtype_moves_bit_exactly(layout, dtype, make_cache, make_batch):
    cache = make_cache(layout, (2, 6, 2, 32, 32), dtype)
    assert_moves(cache, make_batch, [[4, 1, 3]], [[1, 3]])


@pytest.mark.parametrize("layout", ["head_major", "vec"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 1), (3, 4, 1, 3, 5), (1, 3, 5, 7, 2)])
def test_odd_sizes_and_size_one_are_moved(layout, shape, make_cache, make_batch):
    sources = [list(range(1, shape[1]))]
    assert_moves(make_cache(layout, shape), make_batch, sources, [sources[0][-1:]])
    assert_moves(make_cache(layout, shape), make_batch, sources, sources)


def test_destinations_may_be_private_blocks(make_cache, make_batch):
    cache = make_cache("vec", (2, 8, 2, 16, 16))
    before = cache.blocks[:, [4, 1, 3]].clone()
    assert_moves(cache, make_batch, [[4, 1, 3]], [[7, 2]])
    assert torch.equal(cache.blocks[:, [4, 1, 3]], before)


def test_every_read_comes_before_the_first_write(make_cache, make_batch):
    """Each request writes into blocks that another request of the batch reads."""
    cache = make_cache("amx", (2, 8, 2, 16, 16), torch.bfloat16)
    assert_moves(cache, make_batch, [[1, 2], [3, 4], [5, 6, 7]], [[3, 5], [7], [2, 1]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_blocks_and_poison_keep_every_bit(layout, make_cache, make_batch):
    cache = make_cache(layout, (2, 6, 2, 16, 16), torch.float32)
    others = [0, 2, 3, 5]
    before = bits(cache.blocks[:, others])
    batch = make_batch([[4, 1, 3]], [[1, 4]], [0])
    compact(cache.kv, batch, random_kept(batch, 2, 2, 16))
    assert torch.equal(bits(cache.blocks[:, others]), before)
    assert cache.blocks[:, 0].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_layers_share_moves_as_if_each_had_its_own(layout, in_place, make_cache, make_batch):
    batch = make_batch([[1, 2, 3], [4, 5]], [[1, 2], [4]] if in_place else [[7, 4], [5]], [0, 0])
    kept = random_kept(batch, 1, 2, 16).expand(-1, 4, -1, -1)
    for order in (kept, fill_holes(kept, batch, 16)):
        found, expected = (make_cache(layout, (4, 8, 2, 16, 16)) for _ in range(2))
        compact(found.kv, batch, order)
        compact(expected.kv, batch, order.contiguous())
        assert torch.equal(bits(found.blocks), bits(expected.blocks))


@pytest.mark.parametrize("offset", range(5))
def test_a_cache_may_start_anywhere_in_its_storage(offset, make_batch):
    """Neighbouring elements are moved together only where alignment allows."""
    storage = torch.arange(offset + 4 * 2 * 8, dtype=torch.int16)
    blocks = storage[offset:].view(1, 4, 1, 2, 8)
    expected = blocks.clone()
    expected[0, 3] = expected[0, [1, 2], :, [1, 0]].transpose(0, 1)
    compact(
        PagedKV.from_blocks(blocks),
        make_batch([[1, 2]], [[3]], [0]),
        torch.tensor([1, 2]).view(1, 1, 1, 2),
    )
    assert torch.equal(blocks, expected)


def test_payloads_of_nan_survive(make_batch):
    pattern = torch.tensor([0x7FC1, 0x7F81, -1, 0x0001], dtype=torch.int16)
    blocks = pattern.view(1, 2, 1, 1, 2).clone()
    compact(
        PagedKV.from_blocks(blocks.view(torch.bfloat16)),
        make_batch([[0]], [[1]], [0]),
        torch.zeros(1, 1, 1, 1, dtype=torch.int64),
    )
    assert blocks.flatten().tolist() == [0x7FC1, 0x7F81, 0x7FC1, 0x7F81]


def test_fp8_moves_as_bytes(make_batch):
    raw = torch.arange(64, dtype=torch.uint8).view(1, 4, 1, 4, 4)
    blocks = raw.clone().view(torch.float8_e4m3fn)
    batch = make_batch([[1, 2, 3]], [[3]], [0])
    compact(PagedKV.from_blocks(blocks), batch, torch.tensor([1, 5, 6, 11]).view(1, 1, 1, 4))
    moved = raw.flatten(1, 3).clone()
    moved[:, 12:] = raw.flatten(1, 3)[:, [5, 9, 10, 15]]
    assert torch.equal(blocks.view(torch.uint8).flatten(1, 3), moved)


def test_keeping_everything_changes_nothing(make_cache, make_batch):
    cache = make_cache("vec", (2, 4, 2, 16, 16))
    before = bits(cache.blocks)
    batch = make_batch([[3, 1]], [[3, 1]], [7])
    compact(cache.kv, batch, torch.arange(32).expand(1, 2, 2, 32))
    assert torch.equal(bits(cache.blocks), before)


@settings(max_examples=40)
@given(data=st.data())
def test_any_batch_of_rounds_moves_as_with_lists(data):
    num_requests = data.draw(st.integers(1, 3), "num_requests")
    counts = [data.draw(st.integers(1, 3), "num_source") for _ in range(num_requests)]
    order = data.draw(st.permutations(range(1, 12)), "order")
    sources = [order[sum(counts[:r]) : sum(counts[: r + 1])] for r in range(num_requests)]
    targets = data.draw(st.permutations(range(1, 12)), "targets")
    num_destination = [data.draw(st.integers(1, n), "num_destination") for n in counts]
    destinations = [
        targets[sum(num_destination[:r]) : sum(num_destination[: r + 1])]
        for r in range(num_requests)
    ]
    shape = (2, 12, 1, 3, 2)
    content = torch.arange(2 * 12 * 3 * 4, dtype=torch.float32).view(2, 12, 1, 3, 4)

    batch = RoundBatch(
        padded(sources),
        padded(destinations),
        tuple(counts),
        tuple(num_destination),
        (0,) * num_requests,
    )
    kept = random_kept(batch, shape[0], shape[2], shape[3])
    blocks = content.clone()
    compact(PagedKV.from_blocks(blocks), batch, kept)
    for found, dense in ((blocks[..., :2], content[..., :2]), (blocks[..., 2:], content[..., 2:])):
        assert bits(found).tolist() == oracle(dense, sources, destinations, kept.tolist())
