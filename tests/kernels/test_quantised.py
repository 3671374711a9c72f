"""Quantised caches: fp8 numbers, and scales that belong to one token and head."""

from dataclasses import replace

import pytest
import torch
from kernel_inputs import LAYOUTS
from scaled_blocks import LARGEST, compact_scaled, scaled_cache, score_scaled
from score_oracle import assert_close_by_row, oracle, random_weights
from torch import Tensor
from triattention_kernels import ArgumentError, PagedKV, fill_holes, score
from triton_runs import run_triton

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
SCALED = tuple(LARGEST)


def assert_scaled_scores(cache, dtype, batch, weights, *rope) -> None:
    """Both implementations against complex arithmetic on what the numbers stand for."""
    expected = oracle(cache.keys, batch, *weights, *rope)
    arguments = (cache.blocks, dtype, batch, *weights, *rope)
    assert_close_by_row(score_scaled(*arguments, "torch"), expected, 1e-5)
    found, _ = run_triton("scaled_blocks:score_scaled", *arguments, "triton")
    assert_close_by_row(found, expected, 1e-5)


def test_a_scaled_key_by_hand(make_batch):
    numbers = torch.tensor([3, 4, 1, 0, 9, 9, 9, 9], dtype=torch.int8).view(torch.uint8)
    scales = torch.tensor([[0.5], [100.0]]).view(torch.uint8)
    row = torch.cat([numbers[:4], scales[0], numbers[4:], scales[1]])
    batch = make_batch([[0]], [[0]], [0])
    weights = (
        torch.tensor([1.0, 2.0, 7.0, 0.0]).view(1, 1, 4),
        torch.tensor([0.5]).view(1, 1, 1),
        torch.ones(1, 1, 1, dtype=torch.complex64),
    )
    arguments = (row.view(1, 1, 1, 1, 16), torch.int8, batch, *weights, False, 2)
    expected = [[[[0.5 * (1 * 3 + 2 * 4 + 7 * 1 + 0.5 * 5)]]]]
    assert score_scaled(*arguments, "torch").tolist() == expected
    assert run_triton("scaled_blocks:score_scaled", *arguments, "triton")[0].tolist() == expected


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_keys_of_every_layout_are_scored_as_numbers(layout, dtype, make_cache, make_batch):
    """Regression: fp8 bytes were scored as integers."""
    cache = make_cache(layout, (2, 5, 2, 16, 32), dtype)
    batch = make_batch([[3, 1], [4]], [[2], [1]], [5, 0])
    arguments = (batch, *random_weights((2, 2, 6, 32), 32), False, 32)
    expected = oracle(cache.dense()[0].double(), *arguments)
    assert_close_by_row(score(cache.kv, *arguments), expected, 1e-5)
    found, _ = run_triton("triattention_kernels:score", cache.kv, *arguments, "triton")
    assert_close_by_row(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_byte_is_scored_as_the_number_it_stands_for(dtype, make_batch):
    raw = torch.arange(256, dtype=torch.uint8).view(1, 2, 1, 128, 1)
    kv = PagedKV.from_blocks(torch.cat([raw, raw], dim=-1).contiguous().view(dtype))
    batch = make_batch([[0, 1]], [[0]], [0])
    no_turns = torch.ones(1, 1, 0, dtype=torch.complex64)
    arguments = (kv, batch, torch.ones(1, 1, 1), torch.ones(1, 1, 0), no_turns, False, 0)
    expected = raw.flatten().view(dtype).float()
    for found in (
        score(*arguments),
        run_triton("triattention_kernels:score", *arguments, "triton")[0],
    ):
        assert torch.equal(found.flatten().isnan(), expected.isnan())
        assert torch.equal(found.flatten().nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("token_major", [False, True])
def test_scales_of_tokens_and_heads_multiply_their_scores(dtype, token_major, make_batch):
    cache = scaled_cache((2, 5, 2, 16, 32), dtype, token_major)
    batch = make_batch([[3, 1], [4]], [[2], [1]], [5, 0])
    weights = random_weights((2, 2, 6, 32), 32)
    assert_scaled_scores(cache, dtype, batch, weights, False, 32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("group", "head_dim", "rotary_dim", "interleaved"),
    [(1, 64, 64, False), (3, 80, 32, True), (7, 96, 0, False), (16, 256, 64, True)],
)
def test_every_group_and_head_dim_is_scored_with_scales(
    dtype, group, head_dim, rotary_dim, interleaved, make_batch
):
    cache = scaled_cache((1, 4, 2, 16, head_dim), dtype, token_major=True)
    batch = make_batch([[3, 1]], [[2]], [0])
    weights = random_weights((1, 1, 2 * group, head_dim), rotary_dim)
    assert_scaled_scores(cache, dtype, batch, weights, interleaved, rotary_dim)


def moved_by_hand(blocks: Tensor, batch, kept: Tensor) -> list:
    """The bytes of all tokens after the moves, one token at a time."""
    before, after = blocks.tolist(), blocks.tolist()
    block_size = blocks.shape[3]
    for r, num_destination in enumerate(batch.num_destination_blocks):
        source, destination = batch.source_blocks[r].tolist(), batch.destination_blocks[r].tolist()
        for layer, head in torch.cartesian_prod(*map(torch.arange, kept.shape[1:3])).tolist():
            for slot in range(num_destination * block_size):
                token = int(kept[r, layer, head, slot])
                row = before[layer][source[token // block_size]][head][token % block_size]
                after[layer][destination[slot // block_size]][head][slot % block_size] = row
    return after


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("moves_forward", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 2, 16, 32), (1, 8, 1, 3, 4)])
def test_scales_move_along(dtype, token_major, moves_forward, shape, make_batch):
    cache = scaled_cache(shape, dtype, token_major)
    destinations = [[4, 7], [6]] if moves_forward else [[1, 4], [3]]
    batch = make_batch([[4, 1, 3], [6, 5]], destinations, [0, 0])
    batch = replace(batch, moves_forward=moves_forward)
    generator = torch.Generator().manual_seed(3)
    block_size = shape[3]
    kept = torch.zeros(2, shape[0], shape[2], 2 * block_size, dtype=torch.int64)
    for r, num_blocks in enumerate((3, 2)):
        for row in kept[r].flatten(0, 1):
            order = torch.randperm(num_blocks * block_size, generator=generator)
            num_kept = batch.num_destination_blocks[r] * block_size
            row[:num_kept] = order[:num_kept].sort().values
    for order in (kept, fill_holes(kept, batch, block_size)):
        expected = moved_by_hand(cache.blocks, batch, order)
        blocks = cache.blocks.clone()
        arguments = (blocks, dtype, batch, order)
        _, found = run_triton("scaled_blocks:compact_scaled", *arguments, "triton")
        assert found[0].tolist() == expected
        compact_scaled(*arguments, "torch")
        assert blocks.tolist() == expected


def test_numbers_without_their_scales_are_refused(make_batch):
    """Scores of int8 numbers alone would compare tokens in different units."""
    batch = make_batch([[1]], [[1]], [0])
    weights = (*random_weights((1, 2, 4, 8), 8), False, 8)
    for dtype in (torch.int8, torch.uint8):
        kv = PagedKV.from_blocks(torch.zeros(2, 6, 2, 4, 16, dtype=dtype))
        with pytest.raises(ArgumentError, match="without a scale for every token and head"):
            score(kv, batch, *weights)
    scaled = PagedKV.from_scaled_blocks(torch.zeros(2, 6, 2, 4, 24, dtype=torch.uint8), torch.uint8)
    with pytest.raises(ArgumentError, match="uint8 cannot be scored with a scale .*; .* int8"):
        score(scaled, batch, *weights)


@pytest.mark.parametrize(
    "blocks",
    [
        torch.zeros(1, 2, 1, 4, 24, dtype=torch.bfloat16),
        torch.zeros(1, 2, 1, 24, 4, dtype=torch.uint8).transpose(3, 4),
        torch.zeros(1, 2, 1, 4, 26, dtype=torch.uint8),
        torch.zeros(1 + 8 * 24, dtype=torch.uint8)[1:].view(1, 2, 1, 4, 24),
    ],
)
def test_blocks_in_which_no_scale_can_lie_are_refused(blocks):
    with pytest.raises(ArgumentError, match="float32 scales lie in them"):
        PagedKV.from_scaled_blocks(blocks, torch.int8)
