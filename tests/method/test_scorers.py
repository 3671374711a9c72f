"""Scorers that need no queries: by hand, and what a round keeps with them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scaled_blocks import scaled_cache
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.score_knorm import KnormScorer
from triattention_vllm.method.score_random import RandomScorer
from triattention_vllm.method.score_streamingllm import StreamingLLMScorer
from triattention_vllm.method.score_vnorm import VnormScorer
from triattention_vllm.method.scorer import Scorer

NUM_LAYERS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 3, 2, 4, 8
SCORERS: dict[str, Callable[[], Scorer]] = {
    "streamingllm": StreamingLLMScorer,
    "knorm": KnormScorer,
    "vnorm": VnormScorer,
    "random": lambda: RandomScorer(range(NUM_LAYERS)),
}


def small_cache(num_blocks: int = 9) -> PagedKV:
    """A cache of random keys and values."""
    shape = (NUM_LAYERS, num_blocks, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return PagedKV.from_blocks(blocks)


def rows(cached: Tensor, blocks: list[int]) -> Tensor:
    """Keys or values of a region, [L, H_kv, T, D], read token by token."""
    tokens = [cached[:, block, :, slot, 0, :, 0] for block in blocks for slot in range(BLOCK_SIZE)]
    return torch.stack(tokens, dim=2)


TWO_REQUESTS = RoundBatch(
    source_blocks=torch.tensor([[3, 1, 7], [5, 2, 0]]),
    destination_blocks=torch.tensor([[3, 1], [5, 0]]),
    num_source_blocks=(3, 2),
    num_destination_blocks=(2, 1),
    first_candidate=(1, 0),
)


def blocks_with(key: list[float], value: list[float]) -> PagedKV:
    """One layer, one head, one block of two tokens: zeros, and this key and value."""
    blocks = torch.zeros(1, 1, 1, 2, 4)
    blocks[0, 0, 0, 1] = torch.tensor(key + value)
    return PagedKV.from_blocks(blocks)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (StreamingLLMScorer(), [0.0, 1.0]),
        (KnormScorer(), [0.0, -5.0]),
        (VnormScorer(), [0.0, 13.0]),
    ],
    ids=["streamingllm", "knorm", "vnorm"],
)
def test_scores_checked_by_hand(scorer: Scorer, expected: list[float]) -> None:
    kv = blocks_with([3.0, 4.0], [5.0, 12.0])
    zero = torch.tensor([[0]])
    batch = RoundBatch(zero, zero, (1,), (1,), (0,))
    assert scorer.scores(kv, batch, [2]).tolist() == [[[expected]]]


def test_norms_are_read_through_the_block_table() -> None:
    kv = small_cache()
    keys = KnormScorer().scores(kv, TWO_REQUESTS, [12, 8])
    values = VnormScorer().scores(kv, TWO_REQUESTS, [12, 8])
    for idx, blocks in enumerate([[3, 1, 7], [5, 2]]):
        num_tokens = len(blocks) * BLOCK_SIZE
        expected = rows(kv.keys, blocks).norm(dim=-1)
        torch.testing.assert_close(-keys[idx, ..., :num_tokens], expected)
        expected = rows(kv.values, blocks).norm(dim=-1)
        torch.testing.assert_close(values[idx, ..., :num_tokens], expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_norms_of_quantised_tokens_have_their_scales(dtype: torch.dtype) -> None:
    cache = scaled_cache((2, 5, 2, 4, 8), dtype)
    kv = PagedKV.from_scaled_blocks(cache.blocks, dtype)
    blocks = torch.tensor([[3, 1]])
    batch = RoundBatch(blocks, blocks[:, :1], (2,), (1,), (0,))
    for scorer, tokens in ((KnormScorer(), cache.keys), (VnormScorer(), cache.values)):
        found = scorer.scores(kv, batch, [100])
        expected = tokens.norm(dim=-1)[:, [3, 1]].transpose(1, 2).flatten(2)
        torch.testing.assert_close(found[0].double().abs(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", SCORERS)
def test_a_round_keeps_the_candidates_with_the_highest_scores(method: str) -> None:
    kv = small_cache()
    scorer = SCORERS[method]()
    scores = scorer.scores(kv, TWO_REQUESTS, [12, 8])
    kept = run_rounds(kv, TWO_REQUESTS, [12, 8], scorer, "per_layer_per_head", "repack").kept
    for idx, first in enumerate(TWO_REQUESTS.first_candidate):
        num_tokens = TWO_REQUESTS.num_source_blocks[idx] * BLOCK_SIZE
        num_kept = TWO_REQUESTS.num_destination_blocks[idx] * BLOCK_SIZE
        for layer in range(NUM_LAYERS):
            for head in range(NUM_HEADS):
                own = kept[idx, layer, head, :num_kept].tolist()
                assert own[:first] == list(range(first))
                ranked = sorted(
                    range(first, num_tokens), key=scores[idx, layer, head].tolist().__getitem__
                )
                assert sorted(own[first:]) == sorted(ranked[-(num_kept - first) :])


def test_holes_are_filled_only_where_tokens_move_in_place() -> None:
    """Through scratch memory every token moves, and one launch less is needed in order."""
    assert not TWO_REQUESTS.moves_forward
    caches = [small_cache(), small_cache()]
    for kv, compaction in zip(caches, ("repack", "fill_holes"), strict=True):
        run_rounds(kv, TWO_REQUESTS, [12, 8], KnormScorer(), "per_layer_per_head", compaction)
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)


@pytest.mark.parametrize("method", SCORERS)
def test_a_request_scores_the_same_alone_and_beside_a_longer_one(method: str) -> None:
    kv = small_cache()
    together = SCORERS[method]().scores(kv, TWO_REQUESTS, [12, 8])[1, ..., :8]
    alone = replace(
        TWO_REQUESTS,
        source_blocks=torch.tensor([[5, 2]]),
        destination_blocks=torch.tensor([[5]]),
        num_source_blocks=(2,),
        num_destination_blocks=(1,),
        first_candidate=(0,),
    )
    assert SCORERS[method]().scores(kv, alone, [8])[0].equal(together)


def test_random_scores_differ_between_layers_heads_and_rounds_and_repeat_for_the_same() -> None:
    kv = small_cache()
    scores = SCORERS["random"]().scores(kv, TWO_REQUESTS, [12, 8])
    drawn = [tuple(head.tolist()) for head in scores[..., :8].flatten(0, 2)]
    assert len(set(drawn)) == len(drawn) == 2 * NUM_LAYERS * NUM_HEADS
    assert 0 <= scores.min() < scores.max() < 1
    assert SCORERS["random"]().scores(kv, TWO_REQUESTS, [12, 8]).equal(scores)


def test_two_ranks_draw_at_random_what_one_rank_draws() -> None:
    kv = small_cache()
    whole = SCORERS["random"]().scores(kv, TWO_REQUESTS, [12, 8])
    for head in range(NUM_HEADS):
        shard = PagedKV(kv.keys[:, :, head : head + 1], kv.values[:, :, head : head + 1])
        own = RandomScorer(range(NUM_LAYERS), head).scores(shard, TWO_REQUESTS, [12, 8])
        assert own.equal(whole[:, :, head : head + 1])
