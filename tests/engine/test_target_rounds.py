"""Settings of the score reach the rounds of a worker."""

from typing import Any

import pytest
import torch
from small_statistics import MODEL, some_statistics
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.rounds import TargetRounds, triattention_scorer
from triattention_vllm.method.ranking import Ranking
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.score_knorm import KnormScorer

PLAN = RoundPlan(
    request_id="a",
    group_id=0,
    nominal_boundary=12,
    source_blocks=(3, 1, 7),
    first_candidate=1,
    destination_blocks=(3, 1),
    row_start=0,
    row_blocks=(0, 3, 1),
)
ROTARY = Rotary(
    inv_freq=torch.tensor([[1.0, 0.01]] * 2, dtype=torch.float64),
    attention_factor=torch.ones(2, dtype=torch.float64),
    rotary_dims=MODEL.rotary_dims,
    interleaved=False,
)


def small_cache() -> PagedKV:
    """Keys of the layers differ in length, so that it matters whether scores are normalised; values
    are alike, so that it matters which come later."""
    blocks = torch.randn(3, 9, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    blocks[..., 8:] += 1
    return PagedKV.from_blocks(blocks * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1, 1))


def kept_by(ranking: Ranking) -> Tensor:
    batch = RoundBatch(
        torch.tensor([PLAN.source_blocks]),
        torch.tensor([PLAN.destination_blocks]),
        (3,),
        (2,),
        (1,),
    )
    scorer = KnormScorer()
    return run_rounds(small_cache(), batch, [12], scorer, "per_head", "repack", (), ranking).kept


@pytest.mark.parametrize(
    ("chosen", "ranking"),
    [
        ({}, Ranking()),
        ({"score_normalise": "none"}, Ranking(normalise=False)),
        ({"score_layers": "max"}, Ranking(layers="max")),
        ({"score_redundancy": 1000}, Ranking(redundancy=1000)),
        ({"score_protect_values": 60}, Ranking(protected_values=60)),
    ],
    ids=str,
)
def test_rounds_rank_as_the_settings_say(chosen: dict[str, Any], ranking: Ranking) -> None:
    settings = Settings.from_mapping({"method": "knorm", **chosen})
    rounds = TargetRounds(small_cache(), 4, KnormScorer(), settings)
    kept = rounds.run_batch([PLAN])
    assert kept.equal(kept_by(ranking))
    assert not chosen or not kept.equal(kept_by(Ranking())), "another ranking keeps the same here"


def test_the_score_has_the_offsets_and_the_norm_term_of_the_settings() -> None:
    def weights(**chosen: Any) -> tuple[Tensor, Tensor]:
        scorer = triattention_scorer(
            some_statistics(), ROTARY, torch.device("cpu"), Settings(**chosen), 100
        )
        return scorer.turns([12]), scorer.norm_weights

    of_turns, of_norms = weights()
    assert of_norms.all()
    assert not weights(score_norm_term="none")[1].any()
    short, _ = weights(score_offsets="short")
    assert short.equal(weights(score_offsets="1,2,4,8,16,32,64")[0])
    assert not torch.allclose(short, of_turns)
