"""Scorers that look at queries: by hand, against float64, and what a round keeps with them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_scores import NUM_QUERIES, observed_scores
from scaled_blocks import scaled_cache
from small_rounds import BLOCK_SIZE, HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, TWO_REQUESTS, small_cache
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.errors import RoundError
from triattention_vllm.method.region import region_tokens
from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.scorer import Observation
from triattention_vllm.method.scorers import OBSERVING_SCORERS

GROUP = 3
SCALES = (HEAD_DIM**-0.5, 0.7)
METHODS = tuple(OBSERVING_SCORERS)
BOUNDARIES = [12, 8]


def observed(method: str, seed: int = 1) -> list[Observation]:
    """Queries of two requests."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_LAYERS, NUM_QUERIES[method], NUM_KV_HEADS * GROUP, HEAD_DIM)
    return [Observation(torch.randn(shape, generator=generator)) for _ in range(2)]


def tokens(kv: PagedKV, layer: int, blocks: list[int]) -> Tensor:
    """Keys of a region, [H_kv, T, D], read token by token."""
    rows = [kv.keys[layer, b, :, slot, 0, :, 0] for b in blocks for slot in range(BLOCK_SIZE)]
    return torch.stack(rows, dim=1)


def one_head(keys: list[list[float]]) -> tuple[PagedKV, RoundBatch]:
    """One layer and KV head, one block with these keys."""
    blocks = torch.zeros(1, 1, 1, len(keys), 2 * len(keys[0]))
    blocks[0, 0, 0, :, : len(keys[0])] = torch.tensor(keys)
    zero = torch.tensor([[0]])
    return PagedKV.from_blocks(blocks), RoundBatch(zero, zero, (1,), (1,), (0,))


def by_hand(method: str, queries: list[list[list[float]]], keys: list[list[float]]) -> list[float]:
    """Scores of one layer and KV head; queries [n][G][D]; logits are plain products."""
    kv, batch = one_head(keys)
    seen = [Observation(torch.tensor([queries]))]
    scores = OBSERVING_SCORERS[method]([1.0]).scores(kv, batch, [9], seen)
    return scores.flatten().tolist()


LOG3 = 1.0986122886681098


def test_tova_by_hand_is_the_mean_over_heads_of_what_the_last_query_attends_to() -> None:
    """Heads attend (1/4, 3/4) and (1/2, 1/2); the earlier query does not count."""
    queries = [[[9.0, 9.0], [9.0, 9.0]], [[0.0, LOG3], [0.0, 0.0]]]
    assert by_hand("tova", queries, [[1.0, 0.0], [0.0, 1.0]]) == pytest.approx([0.375, 0.625])


def test_h2o_by_hand_adds_up_queries_heads_and_earlier_rounds() -> None:
    queries = [[[0.0, LOG3]], [[0.0, 0.0]]]
    kv, batch = one_head([[1.0, 0.0], [0.0, 1.0]])
    seen = Observation(torch.tensor([queries]), earlier=torch.tensor([[[10.0]]]))
    scores = OBSERVING_SCORERS["h2o"]([1.0]).scores(kv, batch, [9], [seen])
    assert scores.flatten().tolist() == pytest.approx([10.75, 1.25])


def test_snapkv_by_hand_takes_the_best_head_and_smooths_over_three_neighbours() -> None:
    """Of five tokens only the first is looked at: its attention 3/7 reaches the fourth token."""
    queries = [[[LOG3], [0.0]]]
    found = by_hand("snapkv", queries, [[1.0], [0.0], [0.0], [0.0], [0.0]])
    assert found == pytest.approx([3 / 7] * 4 + [1 / 7])


def test_rkv_by_hand_calls_all_but_the_latest_of_equal_keys_redundant() -> None:
    """Keys a, a, b with a and b at right angles: each a resembles the other and nothing else, so
    the later a is spared by the first and the first by the later: no redundancy at all. A third
    a is spared by both others, and spares the second."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    even = by_hand("rkv", [[[0.0, 0.0]]], [a, a, b])
    assert even == pytest.approx([0.1 / 3 - 0.9 / 3] * 3)
    first, second, third, other = by_hand("rkv", [[[0.0, 0.0]]], [a, a, a, b])
    assert first < second < third == pytest.approx(other)


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_the_formula_in_float64(method: str) -> None:
    kv, seen = small_cache(), observed(method)
    scores = OBSERVING_SCORERS[method](SCALES).scores(kv, TWO_REQUESTS, BOUNDARIES, seen)
    assert scores.shape == (2, NUM_LAYERS, NUM_KV_HEADS, 3 * BLOCK_SIZE)
    for idx, blocks in enumerate([[3, 1, 7], [5, 2]]):
        first, end = TWO_REQUESTS.first_candidate[idx], len(blocks) * BLOCK_SIZE
        for layer in range(NUM_LAYERS):
            keys = tokens(kv, layer, blocks)[:, first:]
            expected = observed_scores(method, seen[idx].queries[layer], keys, SCALES[layer])
            found = scores[idx, layer, :, first:end].double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_rkv_scores_more_tokens_than_one_chunk_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, seen = small_cache(), observed("rkv")
    whole = OBSERVING_SCORERS["rkv"](SCALES).scores(kv, TWO_REQUESTS, BOUNDARIES, seen)
    monkeypatch.setattr("triattention_vllm.method.score_rkv._CHUNK", 5)
    parts = OBSERVING_SCORERS["rkv"](SCALES).scores(kv, TWO_REQUESTS, BOUNDARIES, seen)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("method", METHODS)
def test_a_request_scores_the_same_alone_and_beside_a_longer_one(method: str) -> None:
    kv, seen = small_cache(), observed(method)
    scorer = OBSERVING_SCORERS[method](SCALES)
    together = scorer.scores(kv, TWO_REQUESTS, BOUNDARIES, seen)[1, ..., : 2 * BLOCK_SIZE]
    alone = replace(
        TWO_REQUESTS,
        source_blocks=torch.tensor([[5, 2]]),
        destination_blocks=torch.tensor([[5]]),
        num_source_blocks=(2,),
        num_destination_blocks=(1,),
        first_candidate=(0,),
    )
    assert scorer.scores(kv, alone, [8], seen[1:])[0].equal(together)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(METHODS), st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 2))
def test_a_round_keeps_the_candidates_with_the_highest_scores_and_all_that_is_protected(
    method: str, seed: int, first_candidate: int, num_kept_blocks: int
) -> None:
    kv, seen = small_cache(seed), observed(method, seed + 1)[:1]
    batch = RoundBatch(
        torch.tensor([[4, 1, 6]]),
        torch.tensor([[4, 1][:num_kept_blocks]]),
        (3,),
        (num_kept_blocks,),
        (first_candidate,),
    )
    scorer = OBSERVING_SCORERS[method](SCALES)
    scores = scorer.scores(kv, batch, [12], seen)[0]
    kept = run_rounds(kv, batch, [12], scorer, "per_layer_per_head", "repack", seen).kept[0]
    for layer in range(NUM_LAYERS):
        for head in range(NUM_KV_HEADS):
            own, of_tokens = kept[layer, head].tolist(), scores[layer, head].tolist()
            assert own[:first_candidate] == list(range(first_candidate))
            survivors = own[first_candidate:]
            evicted = set(range(first_candidate, 3 * BLOCK_SIZE)) - set(survivors)
            worst_kept = min((of_tokens[t] for t in survivors), default=0.0)
            assert all(of_tokens[t] <= worst_kept for t in evicted) or not survivors


def test_keys_of_a_quantised_cache_have_their_scales() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        cache = scaled_cache((2, 5, 2, 4, 8), dtype)
        kv = PagedKV.from_scaled_blocks(cache.blocks, dtype)
        _, (_, second) = zip(*kv.evenly_spaced(at_most=1), strict=True)
        found = region_tokens(second, torch.tensor([3, 1]), "keys").double()
        expected = cache.keys[1][[3, 1]].transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_request_whose_queries_are_missing_is_an_error() -> None:
    scorer = OBSERVING_SCORERS["tova"](SCALES)
    with pytest.raises(RoundError, match="2 requests and queries of 1; a scorer that looks at"):
        scorer.scores(small_cache(), TWO_REQUESTS, BOUNDARIES, observed("tova")[:1])
