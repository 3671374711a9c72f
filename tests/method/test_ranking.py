"""Variants of the ranking: by hand, against lists, and equal to ``select`` where it is its own."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_oracle import redundancy_by_lists
from small_rounds import BLOCK_SIZE, NUM_KV_HEADS, NUM_LAYERS, TWO_REQUESTS, small_cache
from torch import Tensor
from triattention_kernels import PagedKV, Repeats, RoundBatch, Selection, select

from triattention_vllm.config import descriptions
from triattention_vllm.method.ranking import Ranking
from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.score_knorm import KnormScorer

GROUP = 2
SELECTIONS = get_args(Selection)


def test_the_settings_offer_the_selections_that_the_kernels_know() -> None:
    assert descriptions()["selection"].choices == SELECTIONS


def random_scores(seed: int) -> Tensor:
    """Of heads that differ in height and spread, so that normalising matters."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_LAYERS, NUM_KV_HEADS * GROUP, 3 * BLOCK_SIZE)
    spread = 10 ** torch.randn(shape[:3], generator=generator).unsqueeze(-1)
    return torch.randn(shape, generator=generator) * spread + spread


def kept(scores: Tensor, kv: PagedKV, ranking: Ranking, selection: Any) -> Tensor:
    ranked = ranking.ranked(scores, kv, TWO_REQUESTS, selection)
    assert ranked.shape == (2, NUM_LAYERS, NUM_KV_HEADS, 3 * BLOCK_SIZE)
    return select(ranked, TWO_REQUESTS, BLOCK_SIZE, NUM_KV_HEADS, selection)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from(SELECTIONS))
def test_the_default_ranking_is_the_one_that_select_has(seed: int, selection: Any) -> None:
    scores = random_scores(seed)
    expected = select(scores, TWO_REQUESTS, BLOCK_SIZE, NUM_KV_HEADS, selection)
    assert kept(scores, small_cache(0), Ranking(), selection).equal(expected)
    assert Ranking().is_built_in


def by_lists(scores: Tensor, ranking: Ranking, selection: str) -> list[list[list[float]]]:
    """[L][H_kv][T] of one request's candidates, from scores [L, H, T]."""
    rows: list[list[list[float]]] = scores.double().tolist()
    if ranking.normalise:
        for of_layer in rows:
            for head, own in enumerate(of_layer):
                mean = sum(own) / len(own)
                std = math.sqrt(sum((x - mean) ** 2 for x in own) / len(own))
                of_layer[head] = [(x - mean) / std for x in own]
    groups = [
        [
            [max(column) for column in zip(*of_layer[h * GROUP : (h + 1) * GROUP], strict=True)]
            for h in range(NUM_KV_HEADS)
        ]
        for of_layer in rows
    ]
    if selection == "per_layer_per_head":
        return groups
    if selection == "union":
        columns = list(zip(*(own for of_layer in groups for own in of_layer), strict=True))
        return [[[max(column) for column in columns]] * NUM_KV_HEADS] * NUM_LAYERS
    heads = []
    for head in range(NUM_KV_HEADS):
        columns = list(zip(*(layer[head] for layer in groups), strict=True))
        if ranking.layers == "max":
            heads.append([max(column) for column in columns])
        else:
            heads.append([sum(column) / NUM_LAYERS for column in columns])
    return [heads] * NUM_LAYERS


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6),
    st.sampled_from(SELECTIONS),
    st.booleans(),
    st.sampled_from(["mean", "max"]),
)
def test_what_is_kept_ranks_highest_in_plain_lists(
    seed: int, selection: Any, normalise: bool, layers: Any
) -> None:
    scores, ranking = random_scores(seed), Ranking(normalise, layers)
    found = kept(scores, small_cache(0), ranking, selection)
    for idx, first in enumerate(TWO_REQUESTS.first_candidate):
        end = TWO_REQUESTS.num_source_blocks[idx] * BLOCK_SIZE
        num_kept = TWO_REQUESTS.num_destination_blocks[idx] * BLOCK_SIZE
        ranks = by_lists(scores[idx, ..., first:end], ranking, selection)
        for layer in range(NUM_LAYERS):
            for head in range(NUM_KV_HEADS):
                own = found[idx, layer, head, :num_kept].tolist()
                assert own[:first] == list(range(first))
                order = sorted(range(end - first), key=ranks[layer][head].__getitem__)
                assert [t - first for t in own[first:]] == sorted(order[first - num_kept :])


def test_without_normalising_the_layer_with_the_largest_scores_decides() -> None:
    """Two layers of one head: the second's scores are a tenth of the first's and turned round."""
    scores = torch.tensor([[[[40.0, 30.0, 20.0, 10.0]], [[1.0, 2.0, 3.0, 4.0]]]])
    kv = PagedKV.from_blocks(torch.zeros(2, 1, 1, 4, 2))
    zero = torch.tensor([[0]])
    batch = RoundBatch(zero, zero, (1,), (1,), (0,))
    raw = Ranking(normalise=False).ranked(scores, kv, batch, "per_head")
    assert raw[0, :, 0].tolist() == [[20.5, 16.0, 11.5, 7.0]] * 2
    top = Ranking(normalise=False, layers="max").ranked(scores, kv, batch, "per_head")
    assert top[0, :, 0].tolist() == [[40.0, 30.0, 20.0, 10.0]] * 2
    normal = Ranking(layers="max").ranked(scores, kv, batch, "per_head")
    outer, inner = 3 / math.sqrt(5), 1 / math.sqrt(5)
    torch.testing.assert_close(normal[0, 0, 0], torch.tensor([outer, inner, inner, outer]))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([20, 50, 300]))
def test_redundancy_is_taken_off_each_heads_scores_as_plain_lists_do(
    seed: int, percent: int
) -> None:
    scores, kv = random_scores(seed), small_cache(seed)
    ranked = Ranking(redundancy=percent).ranked(scores, kv, TWO_REQUESTS, "per_layer_per_head")
    places = [(block, slot) for block in (3, 1, 7) for slot in range(BLOCK_SIZE)][1:]
    plain = by_lists(scores[0, ..., 1:], Ranking(), "per_layer_per_head")
    for layer in range(NUM_LAYERS):
        for head in range(NUM_KV_HEADS):
            values = [kv.values[layer, b, head, slot, 0, :, 0].tolist() for b, slot in places]
            redundancy = redundancy_by_lists(values)
            expected = [
                score - percent / 100 * less
                for score, less in zip(plain[layer][head], redundancy, strict=True)
            ]
            torch.testing.assert_close(ranked[0, layer, head, 1:], torch.tensor(expected))


def test_of_tokens_that_say_the_same_the_latest_stays() -> None:
    """Six candidates of equal score say one thing, two say others: those and the last one stay."""
    one, two, three = torch.eye(8)[:3]
    values = torch.stack([one, two, one, one, one, three, one, one])
    cache = torch.cat([torch.ones(8, 8), values], dim=1).reshape(1, 2, 4, 1, 16).transpose(2, 3)
    kv = PagedKV.from_blocks(cache)
    source, destination = torch.tensor([[0, 1]]), torch.tensor([[0]])
    batch = RoundBatch(source, destination, (2,), (1,), (0,))
    scores = torch.zeros(1, 1, 1, 8)
    found = select(scores, batch, 4, 1, "per_head", repeats=Ranking(redundancy=50).repeats(kv))
    assert found.tolist() == [[[[1, 5, 6, 7]]]]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from(SELECTIONS), st.sampled_from([20, 100, 1000]))
def test_redundancy_comes_off_in_every_ranking(seed: int, selection: Any, percent: int) -> None:
    """``select`` takes it off by itself; other rankings do it before, and just so."""
    scores, kv, ranking = random_scores(seed), small_cache(seed), Ranking(redundancy=percent)
    expected = select(
        scores,
        TWO_REQUESTS,
        BLOCK_SIZE,
        NUM_KV_HEADS,
        selection,
        repeats=Repeats(kv, percent / 100),
    )
    assert kept(scores, kv, ranking, selection).equal(expected)
    assert ranking.is_built_in
    assert ranking.repeats(kv) == Repeats(kv, percent / 100)
    assert not Ranking(redundancy=percent, layers="max").is_built_in


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from(SELECTIONS), st.sampled_from([0, 30, 60, 100]))
def test_the_longest_values_survive_whatever_they_score(
    seed: int, selection: Any, percent: int
) -> None:
    kv = small_cache(seed)
    places = [(block, slot) for block in (3, 1, 7) for slot in range(BLOCK_SIZE)][1:]
    lengths = torch.stack([kv.values[:, b, :, slot, 0, :, 0].norm(dim=-1) for b, slot in places], 2)
    lengths = lengths / lengths.mean(-1, keepdim=True)
    if selection == "per_head":
        lengths = lengths.amax(0, keepdim=True).expand_as(lengths)
    elif selection == "union":
        lengths = lengths.amax((0, 1), keepdim=True).expand_as(lengths)
    ranking = Ranking(protected_values=percent)
    scorer = KnormScorer()
    result = run_rounds(
        kv, TWO_REQUESTS, [12, 8], scorer, selection, "repack", ranking=ranking
    ).kept[0]
    num_protected = 7 * percent // 100
    for layer in range(NUM_LAYERS):
        for head in range(NUM_KV_HEADS):
            order = sorted(range(11), key=lengths[layer, head].tolist().__getitem__)
            longest = {1 + token for token in order[11 - num_protected :]}
            assert longest <= set(result[layer, head].tolist())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_token_whose_score_is_not_finite_ranks_last(selection: Any) -> None:
    scores = random_scores(0)
    scores[0, 0, :, 5] = torch.nan
    scores[0, 1, :, 5] = torch.inf
    for ranking in (Ranking(normalise=False), Ranking(layers="max")):
        assert not (kept(scores, small_cache(0), ranking, selection)[0] == 5).any()
