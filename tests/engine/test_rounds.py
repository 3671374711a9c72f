"""Which rounds of a step share a batch of launches, and so its scratch memory."""

import random
from dataclasses import replace

from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.rounds import batches, runs


def plan_of(name: str, source: range, num_kept: int) -> RoundPlan:
    """A round that packs its own blocks."""
    return RoundPlan(
        request_id=name,
        group_id=0,
        nominal_boundary=0,
        source_blocks=tuple(source),
        first_candidate=0,
        destination_blocks=tuple(source[:num_kept]),
        row_start=0,
        row_blocks=(),
    )


def names(plans: list[RoundPlan], most_blocks: int) -> list[list[str]]:
    return [[plan.request_id for plan in batch] for batch in batches(plans, most_blocks)]


def test_a_batch_is_bounded_by_its_regions_and_not_by_its_requests() -> None:
    lengths = {"a": 2, "b": 3, "c": 12, "d": 1, "e": 4, "f": 4}
    ends = [sum(list(lengths.values())[: i + 1]) for i in range(len(lengths))]
    plans = [
        plan_of(name, range(100 + end - length, 100 + end), 1)
        for (name, length), end in zip(lengths.items(), ends, strict=True)
    ]
    # Padded to the longest: a b is 2 x 3, d e is 2 x 4 and with f 3 x 4; c is alone as too long.
    assert names(plans, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert names(plans, 12) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert names(plans, 0) == [[name] for name in lengths]
    assert names([], 10) == []


def test_no_batch_of_any_step_is_larger_than_the_bound_unless_it_is_one_request() -> None:
    random.seed(4)
    for _ in range(200):
        plans, first = [], 1
        for idx in range(random.randint(1, 40)):
            length = random.choice([1, 2, 3, 20, 200])
            plans.append(plan_of(str(idx), range(first, first + length), 1))
            first += length
        most = random.randint(1, 400)
        found = list(batches(plans, most))
        assert [plan for batch in found for plan in batch] == plans
        for batch, behind in zip(found, [*found[1:], None], strict=True):
            size = len(batch) * max(len(plan.source_blocks) for plan in batch)
            assert size <= most or len(batch) == 1
            if behind is not None:
                more = [*batch, behind[0]]
                assert len(more) * max(len(plan.source_blocks) for plan in more) > most


def names_of_runs(plans: list[RoundPlan]) -> list[dict[int, list[str]]]:
    return [
        {group: [plan.request_id for plan in own] for group, own in run.items()}
        for run in runs(plans)
    ]


def test_a_plan_that_writes_what_an_earlier_one_reads_waits_for_it_whatever_its_group() -> None:
    """Regression: only plans of one group were held against each other, and block 3 is the same
    bytes in all of them."""
    reader, writer = plan_of("reader", range(1, 4), 2), plan_of("writer", range(5, 8), 2)
    moved = replace(writer, destination_blocks=(5, 3))
    assert names_of_runs([reader, writer]) == [{0: ["reader", "writer"]}]
    assert names_of_runs([reader, moved]) == [{0: ["reader"]}, {0: ["writer"]}]
    in_another = replace(moved, group_id=1)
    assert names_of_runs([reader, in_another]) == [{0: ["reader"]}, {1: ["writer"]}]
    first = replace(reader, group_id=1)
    assert names_of_runs([first, moved]) == [{1: ["reader"]}, {0: ["writer"]}]


def test_a_common_step_of_several_groups_is_one_run_and_keeps_its_batches() -> None:
    plans = [
        replace(plan_of(name, range(first + 10 * group, first + 10 * group + 4), 2), group_id=group)
        for name, first in (("a", 100), ("b", 200))
        for group in (0, 1)
    ]
    assert names_of_runs(plans) == [{0: ["a", "b"], 1: ["a", "b"]}]
    assert names_of_runs([]) == []
