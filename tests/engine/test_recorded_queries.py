"""Rings of queries: what a round is given, whatever the steps that computed it."""

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.attention import Attention
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from triattention_vllm.engine.recorded_queries import RecordedQueries
from triattention_vllm.errors import SeamError

NUM_QUERIES, INTERVAL = 4, 8
LAYERS = ("first", "second")
CPU = torch.device("cpu")


def recorded() -> RecordedQueries:
    layers = [cast(Attention, SimpleNamespace(layer_name=name)) for name in LAYERS]
    return RecordedQueries(layers, NUM_QUERIES, INTERVAL)


def step_of(
    tokens: Mapping[str, tuple[int, int]],
    finished: Collection[str] = (),
    begun: Collection[str] = (),
    resumed: Collection[str] = (),
) -> SchedulerOutput:
    """A step in which each request computes positions [start, end); those at 0 and those ``begun``
    are new, and ``resumed`` ones start again after preemption."""
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {name: end - start for name, (start, end) in tokens.items()}
    step.finished_req_ids = set(finished)
    cached = CachedRequestData.make_empty()
    for name, (start, _) in tokens.items():
        if name in resumed or (start and name not in begun):
            cached.req_ids.append(name)
            cached.num_computed_tokens.append(start)
        else:
            step.scheduled_new_reqs.append(
                NewRequestData(name, [], [], SamplingParams(), None, ([],), start, None)
            )
    cached.resumed_req_ids.update(resumed)
    step.scheduled_cached_reqs = cached
    return step


def query(name: str, position: int, layer: str, run: int = 0) -> float:
    """A number that tells every query from every other."""
    return hash((name, position, layer, run)) % 1_000_003


def run_step(
    queries: RecordedQueries,
    tokens: Mapping[str, tuple[int, int]],
    run: int = 0,
    **starts: Collection[str],
) -> None:
    """One step, rows in the order of ``tokens``, with padding behind the last."""
    queries.begin_step(step_of(tokens, **starts))
    queries.read_rows([*tokens, ""], CPU)
    for layer in LAYERS:
        shown = [
            query(name, position, layer, run)
            for name, (start, end) in tokens.items()
            for position in range(start, end)
        ]
        queries.observe(layer, torch.tensor(shown, dtype=torch.float64).view(-1, 1, 1))


def seen(queries: RecordedQueries, name: str, boundary: int) -> list[list[float]]:
    return queries.before(name, boundary)[..., 0, 0].tolist()


def expected(name: str, positions: range, run: int = 0) -> list[list[float]]:
    return [[query(name, position, layer, run) for position in positions] for layer in LAYERS]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=30),
    st.integers(0, INTERVAL - 1),
)
def test_a_round_sees_the_last_queries_before_its_boundary_however_late_it_is_noticed(
    steps: list[tuple[int, int]], lateness: int
) -> None:
    queries, lengths = recorded(), {"a": 0, "b": 0}
    for new in steps:
        tokens = {
            name: (lengths[name], lengths[name] + num)
            for name, num in zip(lengths, new, strict=True)
            if num
        }
        run_step(queries, tokens)
        lengths |= {name: end for name, (_, end) in tokens.items()}
    for name, length in lengths.items():
        boundary = length - lateness
        if boundary >= NUM_QUERIES:
            wanted = range(boundary - NUM_QUERIES, boundary)
            assert seen(queries, name, boundary) == expected(name, wanted)


def test_behind_a_prefix_hit_the_first_queries_that_were_computed_stand_in() -> None:
    queries = recorded()
    run_step(queries, {"a": (20, 22)}, begun={"a"})
    assert seen(queries, "a", 16) == expected("a", range(20, 22))
    run_step(queries, {"a": (22, 30)})
    assert seen(queries, "a", 16) == expected("a", range(20, 24))
    assert seen(queries, "a", 30) == expected("a", range(26, 30))


@pytest.mark.parametrize("num_hits", [0, 16, 30])
@pytest.mark.parametrize("starts", ["resumed", "begun"])
def test_a_request_that_starts_again_shows_nothing_of_its_first_run(
    num_hits: int, starts: str
) -> None:
    """Also where its prefix-cache hit is as long as all that it had computed; model runner V2 is
    told of a request that starts again as of a new one."""
    queries = recorded()
    run_step(queries, {"a": (0, 30)})
    run_step(queries, {"a": (num_hits, num_hits + 3)}, run=1, **{starts: {"a"}})
    again = expected("a", range(num_hits, num_hits + 3), run=1)
    assert seen(queries, "a", num_hits + 2) == again


def test_requests_that_end_make_room_and_others_keep_theirs() -> None:
    queries = recorded()
    for name in ("a", "b", "c"):
        run_step(queries, {name: (0, 6)})
    queries.begin_step(step_of({}, finished={"a", "c"}))
    run_step(queries, {"d": (0, 5), "b": (6, 7), "e": (0, 9)})
    assert seen(queries, "b", 7) == expected("b", range(3, 7))
    assert seen(queries, "d", 5) == expected("d", range(1, 5))
    assert seen(queries, "e", 9) == expected("e", range(5, 9))
    with pytest.raises(SeamError, match="no query of request a was seen before its round at 6 tok"):
        queries.before("a", 6)


def test_queries_that_a_layer_did_not_show_end_the_engine() -> None:
    """A captured graph would run the step without Python: old queries score nothing."""
    queries = recorded()
    run_step(queries, {"a": (0, 6)})
    queries.begin_step(step_of({"a": (6, 7)}))
    queries.read_rows(["a"], CPU)
    queries.observe("first", torch.zeros(1, 1, 1, dtype=torch.float64))
    for ask in (lambda: queries.before("a", 7), lambda: queries.begin_step(None)):
        with pytest.raises(SeamError, match=r"not show its queries: \['second'\].*to PIECEWISE"):
            ask()


def test_a_batch_without_requests_shows_nothing() -> None:
    queries = recorded()
    run_step(queries, {"a": (0, 6)})
    queries.begin_step(None)
    queries.read_rows(["a"], CPU)
    queries.observe("first", torch.full((6, 1, 1), -1.0, dtype=torch.float64))
    assert seen(queries, "a", 6) == expected("a", range(2, 6))
