"""What a scorer that accumulates is told of the survivors of the round before."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.observations import Observations
from triattention_vllm.engine.recorded_queries import RecordedQueries

BLOCK_SIZE = 4


def plan(num_protected: int, num_source: int, num_destination: int, row_start: int) -> RoundPlan:
    """A round behind so many whole protected blocks."""
    source = tuple(range(10, 10 + num_source))
    num_new_null = num_source - num_destination
    row = (0,) * num_new_null + tuple(range(1, 1 + num_protected)) + source[:num_destination]
    return RoundPlan("a", 0, 100, source, 0, source[:num_destination], row_start, row)


@pytest.mark.parametrize("num_grown", [0, 1, 2, 5])
def test_earlier_scores_stay_with_their_tokens_where_the_protected_prompt_has_grown(
    num_grown: int,
) -> None:
    """Regression: in a session under ``all_prompt`` every turn's tokens join the prompt, and the
    region began further on than the scores that were kept: an error, or those of other tokens."""
    queries = SimpleNamespace(before=lambda request_id, boundary: torch.zeros(1, 1, 1, 1))
    seen = Observations(cast(RecordedQueries, queries), accumulates=True, block_size=BLOCK_SIZE)
    first = plan(num_protected=1, num_source=4, num_destination=2, row_start=0)
    assert seen.of(first).earlier is None
    scores = torch.arange(4.0 * BLOCK_SIZE).view(1, 1, 1, -1)
    kept = torch.tensor([0, 1, 2, 3, 6, 9, 12, 15]).view(1, 1, 1, -1)
    seen.keep([first], scores, kept)
    second = plan(1 + num_grown, num_source=5, num_destination=4, row_start=2)
    earlier = seen.of(second).earlier
    assert earlier is not None
    assert earlier.flatten().tolist() == kept.flatten().tolist()[num_grown * BLOCK_SIZE :]
