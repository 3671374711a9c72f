"""Scores of cached keys against arithmetic that is written differently."""

import math

import pytest
import torch
from kernel_inputs import LAYOUTS
from score_oracle import assert_close_by_row, oracle, random_weights
from triattention_kernels import PagedKV, score, score_torch


def test_the_score_of_one_key_by_hand(make_batch):
    blocks = torch.tensor([3.0, 4.0, 9.0, 9.0]).view(1, 1, 1, 1, 4)
    batch = make_batch([[0]], [[0]], [0])
    centres = torch.tensor([1.0, 2.0]).view(1, 1, 2)
    norms = torch.tensor([0.5]).view(1, 1, 1)
    turns = torch.tensor([1.0, 1j]).view(2, 1, 1, 1)
    kv = PagedKV.from_blocks(blocks)
    rotated = score(kv, batch, centres, norms, turns[0], False, 2)
    assert rotated.tolist() == [[[[1 * 3 + 2 * 4 + 0.5 * 5]]]]
    by_a_quarter = score(kv, batch, centres, norms, turns[1], False, 2)  # (1 + 2i) i = -2 + i
    assert by_a_quarter.tolist() == [[[[-2 * 3 + 1 * 4 + 0.5 * 5]]]]
    unrotated = score(kv, batch, centres, norms[..., :0], turns[1, ..., :0], False, 0)
    assert unrotated.tolist() == [[[[1 * 3 + 2 * 4]]]]


def test_pairs_are_halves_or_neighbours_by_hand(make_batch):
    blocks = torch.tensor([3.0, 6.0, 4.0, 8.0, 0, 0, 0, 0]).view(1, 1, 1, 1, 8)
    batch = make_batch([[0]], [[0]], [0])
    norms = torch.tensor([1.0, 100.0]).view(1, 1, 2)
    weights = (torch.zeros(1, 1, 4), norms, torch.ones(1, 1, 2, dtype=torch.complex64))
    kv = PagedKV.from_blocks(blocks)
    halves = score(kv, batch, *weights, False, 4).item()
    assert halves == 5.0 + 100 * 10.0
    neighbours = score(kv, batch, *weights, True, 4).item()
    assert neighbours == pytest.approx(math.sqrt(45) + 100 * math.sqrt(80), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 12, 0])
def test_scores_agree_with_complex_arithmetic(
    layout, interleaved, rotary_dim, make_cache, make_batch
):
    cache = make_cache(layout, (2, 5, 2, 16, 32))
    batch = make_batch([[3, 1], [4]], [[2], [1]], [5, 0])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        weights = random_weights((2, 2, 6, 32), rotary_dim, dtype)
        arguments = (batch, *weights, interleaved, rotary_dim)
        found = score(cache.kv, *arguments)
        assert found.dtype == dtype
        assert_close_by_row(found, oracle(cache.dense()[0], *arguments), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_keys_are_cast_before_the_arithmetic(layout, dtype, make_cache, make_batch):
    cache = make_cache(layout, (2, 4, 2, 16, 32), dtype)
    batch = make_batch([[3, 1]], [[2]], [0])
    arguments = (batch, *random_weights((1, 2, 4, 32), 32), False, 32)
    found = score(cache.kv, *arguments)
    expected = oracle(cache.dense()[0].double(), *arguments)
    assert_close_by_row(found, expected, 1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 2), (3, 4, 1, 3, 6), (1, 3, 5, 7, 10)])
def test_odd_sizes_and_size_one_are_scored(shape, make_cache, make_batch):
    num_layers, num_blocks, num_kv_heads, _, head_dim = shape
    cache = make_cache("head_major", shape)
    batch = make_batch([list(range(1, num_blocks))], [[1]], [0])
    for group in (1, 3):
        size = (1, num_layers, num_kv_heads * group, head_dim)
        arguments = (batch, *random_weights(size, head_dim), False, head_dim)
        expected = oracle(cache.dense()[0], *arguments)
        assert_close_by_row(score(cache.kv, *arguments), expected, 1e-5)


def test_requests_of_a_batch_do_not_touch_each_other(make_cache, make_batch):
    cache = make_cache("vec", (2, 8, 2, 16, 32))
    sources = [[1, 2, 3], [4], [5, 6]]
    *weights, turns = random_weights((3, 2, 4, 32), 32)
    batch = make_batch(sources, [[1], [4], [5]], [0, 0, 0])
    together = score(cache.kv, batch, *weights, turns, False, 32)
    for idx, source in enumerate(sources):
        alone = make_batch([source], [source[:1]], [0])
        found = score(cache.kv, alone, *weights, turns[idx : idx + 1], False, 32)
        assert torch.equal(found[0], together[idx, ..., : found.shape[-1]])
        assert together[idx, ..., found.shape[-1] :].isneginf().all()


def test_the_size_of_a_tile_does_not_matter(make_cache, make_batch, monkeypatch):
    cache = make_cache("amx", (2, 8, 2, 16, 32), torch.bfloat16)
    batch = make_batch([[1, 2, 3, 6, 5]], [[1]], [0])
    arguments = (*random_weights((1, 2, 4, 32), 32), True, 32)
    whole = score(cache.kv, batch, *arguments)
    monkeypatch.setattr(score_torch, "TILE_ELEMENTS", 2 * 2 * 2 * 16 * 32)
    assert_close_by_row(score(cache.kv, batch, *arguments), whole.double(), 1e-6)


def test_a_uniform_factor_on_the_keys_keeps_the_order(make_cache, make_batch):
    cache = make_cache("head_major", (1, 3, 1, 16, 16))
    batch = make_batch([[1, 2]], [[1]], [0])
    arguments = (batch, *random_weights((1, 1, 1, 16), 16), False, 16)
    before = score(cache.kv, *arguments)
    cache.blocks.mul_(4.0)
    assert torch.equal(score(cache.kv, *arguments), 4.0 * before)
