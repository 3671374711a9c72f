"""The order in which kept tokens fill the holes of the destination blocks."""

from dataclasses import replace

import pytest
import torch
from kernel_inputs import random_kept
from torch import Tensor
from triattention_kernels import ArgumentError, PagedKV, RoundBatch, compact, fill_holes
from triton_runs import run_triton


def both(kept: Tensor, batch: RoundBatch, block_size: int) -> Tensor:
    """The order by torch, once Triton has given the same."""
    found, _ = run_triton("triattention_kernels:fill_holes", kept, batch, block_size, "triton")
    order = fill_holes(kept, batch, block_size)
    assert torch.equal(found, order)
    assert order.shape == kept.shape
    return order


def oracle(kept: list[int]) -> list[int]:
    behind = [token for token in kept if token >= len(kept)]
    return [place if place in kept else behind.pop(0) for place in range(len(kept))]


def test_later_tokens_drop_into_the_holes_by_hand(make_batch):
    batch = make_batch([[1, 2, 3, 4]], [[1, 2, 3]], [0])
    kept = torch.tensor([0, 2, 3, 5, 6, 7]).view(1, 1, 1, 6)
    assert both(kept, batch, 2).tolist() == [[[[0, 6, 2, 3, 7, 5]]]]


def test_every_kept_token_has_one_place_and_the_inner_ones_stay(make_batch):
    batch = make_batch([[1, 2, 3, 4], [5, 6], [7]], [[1, 2, 3], [5], [7]], [0, 0, 0])
    kept = random_kept(batch, 1, 5, 7)
    order = both(kept, batch, 7)
    for r, num_destination in enumerate(batch.num_destination_blocks):
        num_kept = 7 * num_destination
        for tokens, places in zip(kept[r, 0].tolist(), order[r, 0].tolist(), strict=True):
            assert places[:num_kept] == oracle(tokens[:num_kept])
            assert not any(places[num_kept:])


def test_long_keep_sets_are_ordered_alike(make_batch):
    batch = make_batch([list(range(80))], [list(range(70))], [0])
    kept = random_kept(batch, 1, 2, 16)
    assert both(kept, batch, 16)[0, 0, 1].tolist() == oracle(kept[0, 0, 1].tolist())


def test_one_token_keeps_its_place_or_takes_the_only_hole(make_batch):
    batch = make_batch([[1, 2]], [[1]], [0])
    for token in (0, 1):
        kept = torch.tensor([token]).view(1, 1, 1, 1)
        assert both(kept, batch, 1).item() == token


def test_keep_sets_that_layers_and_heads_share_stay_shared(make_batch):
    batch = make_batch([[1, 2, 3]], [[1, 2]], [0])
    kept = random_kept(batch, 1, 1, 16).expand(1, 3, 4, 32)
    order = both(kept, batch, 16)
    assert (order == order[:, :1, :1]).all()


def test_the_destination_blocks_hold_exactly_the_kept_tokens(make_batch):
    """Attention does not care about the order, only about the set."""
    batch = make_batch([[1, 2, 3]], [[1, 4]], [0])
    kept = random_kept(batch, 1, 2, 4)
    before = torch.randn(1, 5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    repacked, filled = before.clone(), before.clone()
    compact(PagedKV.from_blocks(repacked), batch, kept)
    order = both(kept, batch, 4)
    compact(PagedKV.from_blocks(filled), replace(batch, moves_forward=True), order)
    for head in range(2):
        contents = [
            sorted(blocks[0, [1, 4], head].flatten(0, 1).tolist()) for blocks in (repacked, filled)
        ]
        assert contents[0] == contents[1]
    in_range = kept[kept < 4]
    stayed = filled[0, 1].eq(before[0, 1]).all(dim=-1).sum()
    assert stayed == len(in_range)


def tokens_of(view: Tensor, block: int) -> Tensor:
    """One block's tokens [L, H_kv, block_size, D], whatever the layout."""
    one = view[:, block]  # [L, H_kv, S1, S2, D1, D2]
    return one.flatten(4).flatten(2, 3).clone()


@pytest.mark.parametrize("layout", ["plain", "vec", "amx"])
def test_few_holes_are_filled_in_place_in_every_layout(layout, make_batch):
    """Most tokens stay: only single tokens are read and written."""
    num_layers, num_kv_heads, block_size, head_dim = 2, 3, 32, 16
    batch = replace(make_batch([[4, 1, 3]], [[4, 1]], [0]), moves_forward=True)
    generator = torch.Generator().manual_seed(1)
    shape = (num_layers, 5, num_kv_heads, block_size, 2 * head_dim)
    blocks = torch.randn(shape, generator=generator)
    make = {"plain": PagedKV.from_blocks, "vec": None, "amx": None}[layout]
    kv = make(blocks) if make else PagedKV.from_cpu_layout(blocks, layout)
    num_kept = 2 * block_size
    sets = num_layers * num_kv_heads
    evicted = torch.stack([torch.randperm(num_kept, generator=generator)[:5] for _ in range(sets)])
    later = (num_kept + torch.arange(5)).expand(sets, -1)
    kept = torch.arange(num_kept).repeat(sets, 1).scatter(1, evicted, later)
    order = fill_holes(
        kept.sort(1).values.view(1, num_layers, num_kv_heads, num_kept), batch, block_size
    )
    region = [
        torch.cat([tokens_of(view, b) for b in (4, 1, 3)], 2) for view in (kv.keys, kv.values)
    ]
    untouched = [tokens_of(view, 2) for view in (kv.keys, kv.values)]
    compact(kv, batch, order)
    for view, before, other in zip((kv.keys, kv.values), region, untouched, strict=True):
        index = order[0].unsqueeze(-1).expand(-1, -1, -1, head_dim)
        after = torch.cat([tokens_of(view, b) for b in (4, 1)], 2)
        assert torch.equal(after, before.gather(2, index))
        assert torch.equal(tokens_of(view, 3), before[:, :, num_kept:])
        assert torch.equal(tokens_of(view, 2), other)


def test_kept_tokens_of_a_wrong_shape_are_refused(make_batch):
    batch = make_batch([[1, 2, 3]], [[1, 2]], [0])
    with pytest.raises(ArgumentError, match=r"kept has shape \[1, 1, 1, 3\]"):
        fill_holes(torch.zeros(1, 1, 1, 3, dtype=torch.int64), batch, 16)
    with pytest.raises(ArgumentError, match="kept is int32; allowed are int64"):
        fill_holes(torch.zeros(1, 1, 1, 32, dtype=torch.int32), batch, 16)
