"""Redundancy of values: by hand, against plain lists, and Triton against torch."""

import math

import pytest
import torch
from kernel_inputs import LAYOUTS
from scaled_blocks import scaled_cache
from score_oracle import redundancy_by_lists
from torch import Tensor
from triattention_kernels import ArgumentError, PagedKV, Repeats, redundancy, select
from triton_runs import run_triton


def oracle(values: Tensor, batch) -> Tensor:
    """values: [L, num_blocks, H_kv, block_size, D]. Float64, 0 for other tokens than candidates."""
    num_layers, _, num_kv_heads, block_size, _ = values.shape
    num_tokens = batch.source_blocks.shape[1] * block_size
    found = torch.zeros(
        batch.num_requests, num_layers, num_kv_heads, num_tokens, dtype=torch.float64
    )
    for idx, first in enumerate(batch.first_candidate):
        num_blocks = batch.num_source_blocks[idx]
        rows = (
            values[:, batch.source_blocks[idx, :num_blocks]].double().transpose(1, 2).flatten(2, 3)
        )
        for layer in range(num_layers):
            for head in range(num_kv_heads):
                plain = redundancy_by_lists(rows[layer, head, first:].tolist())
                found[idx, layer, head, first : num_blocks * block_size] = torch.tensor(plain)
    return found


def of_torch(kv: PagedKV, batch, weight: float = 1.0, **further: int) -> Tensor:
    return redundancy(Repeats(kv, weight, **further), batch)


def of_triton(kv: PagedKV, batch, weight: float = 1.0, **further: int) -> Tensor:
    """0 for other tokens than candidates, which the kernel does not write."""
    num_tokens = batch.source_blocks.shape[1] * kv.block_size
    scores = torch.zeros(batch.num_requests, kv.num_layers, kv.num_kv_heads, num_tokens)
    name = "triattention_kernels.statistics_triton:statistics"
    arguments = (scores, batch, kv.block_size, kv.num_kv_heads, Repeats(kv, weight, **further))
    found, _ = run_triton(name, *arguments)
    for idx, first in enumerate(batch.first_candidate):
        end = batch.num_source_blocks[idx] * kv.block_size
        assert found.penalty[idx, ..., :first].isnan().all()
        assert found.penalty[idx, ..., end:].isnan().all()
        found.penalty[idx, ..., :first] = 0
        found.penalty[idx, ..., end:] = 0
    return found.penalty


def test_of_tokens_that_say_the_same_the_latest_says_nothing_twice(make_batch):
    """Seven tokens of two sayings, one of them opposite to the other, and one that says nothing."""
    one, other, opposite, nothing = [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]
    values = torch.tensor([[one, other, one, opposite, nothing, one, other, [2.0, 2.0]]])
    blocks = torch.cat([torch.ones(1, 8, 2), values], dim=2).view(1, 1, 1, 8, 4)
    kv, batch = PagedKV.from_blocks(blocks), make_batch([[0]], [[0]], [0])
    between = math.sqrt(0.5) ** 8
    sums = [2 + between, 1 + between, 1 + between, 0, 0, between, between, 0]
    expected = torch.tensor(sums).log1p().view(1, 1, 1, 8)
    torch.testing.assert_close(of_torch(kv, batch), expected)
    torch.testing.assert_close(of_torch(kv, batch, 0.5), expected / 2)
    torch.testing.assert_close(of_triton(kv, batch, 0.5), expected / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_plain_lists(layout, make_cache, make_batch):
    cache = make_cache(layout, (2, 6, 2, 16, 32))
    batch = make_batch([[3, 1, 5], [4]], [[2], [1]], [5, 0])
    expected = oracle(cache.dense()[1], batch)
    for found in (of_torch(cache.kv, batch), of_triton(cache.kv, batch)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 2), (3, 4, 1, 3, 6), (1, 3, 5, 7, 10)])
def test_odd_sizes_and_size_one(shape, make_cache, make_batch):
    cache = make_cache("head_major", shape)
    batch = make_batch([list(range(1, shape[1]))], [[1]], [0])
    expected = oracle(cache.dense()[1], batch)
    for found in (of_torch(cache.kv, batch), of_triton(cache.kv, batch)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_numbers_are_compared_as_they_are_stored(dtype, make_cache, make_batch):
    cache = make_cache("head_major", (1, 4, 2, 16, 32), dtype)
    batch = make_batch([[3, 1, 2]], [[2]], [1])
    expected = oracle(cache.dense()[1], batch)
    for found in (of_torch(cache.kv, batch), of_triton(cache.kv, batch)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_blocks", [9, 10, 70])
def test_long_regions_are_compared_in_parts(num_blocks, make_cache, make_batch):
    """128 tokens are one part of torch's, 128 and 64 those of Triton's."""
    cache = make_cache("head_major", (1, num_blocks, 1, 16, 8))
    batch = make_batch([list(range(1, num_blocks))], [[0, 1]], [3])
    values = cache.dense()[1].double()[0, 1:, 0].flatten(0, 1)[3:]
    unit = torch.nn.functional.normalize(values, dim=-1)
    expected = (unit @ unit.T).clamp(min=0).pow(8).triu(1).sum(-1).log1p()
    for found in (of_torch(cache.kv, batch), of_triton(cache.kv, batch)):
        assert (found[..., :3] == 0).all()
        torch.testing.assert_close(found[0, 0, 0, 3:].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most_later", [1, 20, 128, 200, 1000])
def test_only_so_many_later_ones_are_looked_at(most_later, make_cache, make_batch):
    """Regression: a region of a hundred thousand tokens would have held a GPU for seconds."""
    cache = make_cache("head_major", (1, 20, 2, 16, 8))
    batch = make_batch([list(range(1, 20)), [1, 2]], [[0], [1]], [3, 0])
    values = cache.dense()[1].double()[0, 1:].transpose(0, 1).flatten(1, 2)[:, 3:]
    expected = torch.tensor([redundancy_by_lists(head.tolist(), most_later) for head in values])
    for found in (
        of_torch(cache.kv, batch, most_later=most_later),
        of_triton(cache.kv, batch, most_later=most_later),
    ):
        torch.testing.assert_close(found[0, 0, :, 3:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_resembles_none_and_changes_no_other(
    broken, make_cache, make_batch
):
    cache = make_cache("head_major", (1, 4, 1, 16, 16))
    batch = make_batch([[3, 1, 2]], [[2]], [1])
    cache.kv.values[0, 1, 0, 4] = 0
    expected = of_torch(cache.kv, batch)
    cache.kv.values[0, 1, 0, 4, 0, 3] = broken
    for found in (of_torch(cache.kv, batch), of_triton(cache.kv, batch)):
        assert found[0, 0, 0, 20] == 0
        torch.testing.assert_close(found, expected)


def test_quantised_bytes_that_stand_for_no_numbers_are_refused(make_cache, make_batch):
    cache = make_cache("head_major", (1, 2, 1, 4, 8))
    raw = PagedKV.from_blocks(cache.blocks.to(torch.uint8))
    with pytest.raises(ArgumentError, match="values of dtype uint8 cannot be compared without"):
        of_torch(raw, make_batch([[0, 1]], [[0]], [0]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_of_tokens_and_heads_change_nothing(dtype, make_batch):
    cache = scaled_cache((2, 5, 2, 16, 32), dtype, token_major=True)
    batch = make_batch([[3, 1], [4]], [[2], [1]], [5, 0])
    expected = oracle(cache.values, batch)
    for implementation in ("torch", "triton"):
        found, _ = run_triton(
            "scaled_blocks:redundancy_scaled", cache.blocks, dtype, batch, implementation
        )
        for idx, first in enumerate(batch.first_candidate):
            own = slice(first, batch.num_source_blocks[idx] * 16)
            wanted = expected[idx, ..., own]
            torch.testing.assert_close(found[idx, ..., own].double(), wanted, rtol=1e-5, atol=1e-6)


def test_requests_of_a_batch_do_not_touch_each_other(make_cache, make_batch):
    """Bit for bit, beside longer and shorter ones and again."""
    sources, firsts = [list(range(1, 11)), [12, 11, 13], [14]], [3, 0, 2]
    destinations = [[1], [12], [14]]
    kv = make_cache("head_major", (2, 15, 2, 16, 24), torch.bfloat16).kv
    together = of_triton(kv, make_batch(sources, destinations, firsts))
    assert of_triton(kv, make_batch(sources, destinations, firsts)).equal(together)
    for idx, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        alone = of_triton(kv, make_batch([source], [destination], [firsts[idx]]))
        assert alone[0].equal(together[idx, ..., : 16 * len(source)])


def test_scores_of_another_cache_are_refused(make_cache, make_batch):
    kv, batch = make_cache("head_major", (2, 4, 2, 4, 8)).kv, make_batch([[1, 2]], [[1]], [0])
    with pytest.raises(
        ArgumentError, match=r"the cache has .* \(2, 2, 4\), the scores \(3, 2, 4\)"
    ):
        select(torch.zeros(1, 3, 4, 8), batch, 4, 2, "per_head", repeats=Repeats(kv, 0.5))


def test_values_that_triton_does_not_take_are_refused(make_cache, make_batch):
    kv = make_cache("head_major", (1, 2, 1, 4, 8), torch.float64).kv
    with pytest.raises(ArgumentError, match="values are torch.float64; the triton .* reads"):
        of_triton(kv, make_batch([[0, 1]], [[0]], [0]))
