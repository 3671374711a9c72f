"""Rounds are integers: what every request, setting and moment of noticing must agree on."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from triattention_vllm.config import Settings
from triattention_vllm.errors import RoundError
from triattention_vllm.method.policy import (
    Policy,
    Protect,
    Round,
    Window,
    ceil_to_block,
    floor_to_block,
)

DEFAULT = Settings().policy(block_size=16)

NAMED: list[Protect] = ["prompt", "all_prompt", "sinks"]
PROTECT: st.SearchStrategy[Protect | int] = st.one_of(st.sampled_from(NAMED), st.integers(0, 60))
QUARTER: Window = "quarter"
WINDOW: st.SearchStrategy[Window | int] = st.one_of(st.just(QUARTER), st.integers(0, 80))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Policies that start-up accepts: they always leave a survivor."""
    policy = Policy(
        budget=draw(st.integers(1, 400)),
        interval=draw(st.integers(1, 70)),
        window=draw(WINDOW),
        sink_tokens=draw(st.integers(0, 20)),
        protect=draw(PROTECT),
        block_size=draw(st.sampled_from([1, 8, 16, 32, 17])),
    )
    assume(policy.min_survivors() > 0)
    return policy


prompts = st.integers(1, 600)
chunks = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def play(policy: Policy, num_prompt_tokens: int, chunk_sizes: list[int]) -> list[Round]:
    """All rounds of a request whose committed length grows by these chunks."""
    num_committed = num_evicted = 0
    rounds = []
    for chunk_size in chunk_sizes:
        num_committed += chunk_size
        due = policy.due_round(num_committed, num_evicted, num_prompt_tokens)
        if due is not None:
            rounds.append(due)
            num_evicted = due.num_evicted_after
    return rounds


def test_the_first_rounds_of_a_request_worked_out_by_hand() -> None:
    """By default B = 2048, I = 128, W = 512; blocks of 16, a prompt of 100 tokens.

    The first round is due at 2176: evict 128 = 8 blocks; candidates are 100 to 1663 of the row,
    1564 tokens, of which 1436 survive. The next is due 128 tokens later.
    """
    assert DEFAULT.due_round(2175, 0, 100) is None
    first = Round(
        nominal_boundary=2176,
        num_evicted_before=0,
        num_evicted_after=128,
        first_candidate=100,
        end_candidate=1664,
        num_survivors=1436,
    )
    assert DEFAULT.due_round(2176, 0, 100) == first
    assert first.num_newly_evicted == 128
    assert DEFAULT.due_round(2303, 128, 100) is None
    second = replace(first, nominal_boundary=2304, num_evicted_before=128, num_evicted_after=256)
    assert DEFAULT.due_round(2304, 128, 100) == second
    # docs/architecture.md counts with the blocks of this region.
    num_blocks = first.end_candidate // 16 - first.first_candidate // 16
    assert (num_blocks, num_blocks - first.num_newly_evicted // 16) == (98, 90)


def test_budgets_that_are_no_multiple_of_the_block_evict_whole_blocks() -> None:
    """B = 100, I = 10, W = 5, blocks of 16: at 110 tokens 10 are too many, so one block of 16
    goes; candidates 4 to floor(105) = 96, of which 92 - 16 = 76 survive; 94 tokens are left."""
    policy = Policy(
        budget=100, interval=10, window=5, sink_tokens=4, protect="sinks", block_size=16
    )
    assert policy.due_round(110, 0, 1) == Round(110, 0, 16, 4, 96, 76)
    # From 94 cached tokens the next boundary is 16 + 100 + 10.
    assert policy.due_round(125, 16, 1) is None
    assert policy.due_round(126, 16, 1) == Round(126, 16, 32, 4, 96, 76)


@given(policies(), prompts, chunks, st.data())
def test_a_round_does_not_depend_on_when_it_is_noticed(
    policy: Policy, num_prompt_tokens: int, chunk_sizes: list[int], data: st.DataObject
) -> None:
    rounds = play(policy, num_prompt_tokens, chunk_sizes)
    assume(rounds)
    due = data.draw(st.sampled_from(rounds))
    boundary, evicted = due.nominal_boundary, due.num_evicted_before
    late = data.draw(st.integers(0, policy.interval - 1))
    assert policy.due_round(boundary + late, evicted, num_prompt_tokens) == due
    past = policy.due_round(boundary + policy.interval, evicted, num_prompt_tokens)
    assert past is not None
    assert past.nominal_boundary == boundary + policy.interval


@given(policies(), prompts, st.integers(0, 1000), st.integers(0, 30))
def test_nothing_is_due_below_budget_plus_interval(
    policy: Policy, num_prompt_tokens: int, num_cached: int, num_evicted_blocks: int
) -> None:
    evicted = num_evicted_blocks * policy.block_size
    due = policy.due_round(evicted + num_cached, evicted, num_prompt_tokens)
    trigger = policy.request_budget(num_prompt_tokens) + policy.interval
    assert (due is None) == (num_cached < trigger)


@given(policies(), prompts, chunks)
def test_every_round_frees_whole_blocks_and_keeps_its_promises(
    policy: Policy, num_prompt_tokens: int, chunk_sizes: list[int]
) -> None:
    block_size = policy.block_size
    budget = policy.request_budget(num_prompt_tokens)
    prefix = policy.protected_prefix(num_prompt_tokens)
    num_evicted = 0
    for due in play(policy, num_prompt_tokens, chunk_sizes):
        boundary = due.nominal_boundary
        # Evicted tokens are whole blocks, grow with every round, and are just enough.
        assert due.num_evicted_before == num_evicted
        assert due.num_newly_evicted > 0
        assert due.num_newly_evicted % block_size == 0
        assert budget - block_size < boundary - due.num_evicted_after <= budget
        # The boundary is a whole number of intervals past the trigger.
        past_trigger = boundary - (due.num_evicted_before + budget + policy.interval)
        assert past_trigger >= 0
        assert past_trigger % policy.interval == 0
        # Candidates: neither the protected prefix nor the window, and a block-aligned end.
        assert due.first_candidate == prefix
        logical_end = due.end_candidate + due.num_evicted_before
        window = policy.request_window(num_prompt_tokens)
        assert logical_end == floor_to_block(boundary - window, block_size)
        assert logical_end <= boundary - window
        # Every candidate either survives or is evicted.
        num_candidates = due.end_candidate - due.first_candidate
        assert num_candidates == due.num_survivors + due.num_newly_evicted
        num_evicted = due.num_evicted_after


@given(policies(), prompts, chunks)
def test_no_second_round_is_due_right_after_a_round(
    policy: Policy, num_prompt_tokens: int, chunk_sizes: list[int]
) -> None:
    num_committed = num_evicted = 0
    for chunk_size in chunk_sizes:
        num_committed += chunk_size
        due = policy.due_round(num_committed, num_evicted, num_prompt_tokens)
        if due is not None:
            num_evicted = due.num_evicted_after
            assert policy.due_round(num_committed, num_evicted, num_prompt_tokens) is None


@given(policies(), prompts, chunks)
def test_min_survivors_is_never_undercut(
    policy: Policy, num_prompt_tokens: int, chunk_sizes: list[int]
) -> None:
    for due in play(policy, num_prompt_tokens, chunk_sizes):
        assert due.num_survivors >= policy.min_survivors()


@given(policies(), prompts, st.integers(1, 700))
def test_min_survivors_is_never_undercut_token_by_token(
    policy: Policy, num_prompt_tokens: int, num_tokens: int
) -> None:
    for due in play(policy, num_prompt_tokens, [1] * num_tokens):
        assert due.num_survivors >= policy.min_survivors()


@given(
    budget=st.integers(40, 200),
    interval=st.integers(1, 40),
    window=st.just(QUARTER) | st.integers(0, 20),
    block_size=st.sampled_from([8, 16, 17]),
)
def test_min_survivors_is_reached_so_nothing_usable_is_refused(
    budget: int, interval: int, window: Window | int, block_size: int
) -> None:
    """One late notice per possible number of intervals reaches the bound exactly."""
    policy = Policy(budget, interval, window, 4, "sinks", block_size)
    assume(policy.min_survivors() > 0)
    fewest = min(
        due.num_survivors
        for late in range(1, 2 * block_size + 1)
        if (due := policy.due_round(budget + late * interval, 0, 1)) is not None
    )
    assert fewest == policy.min_survivors()


@given(policies(), prompts, st.integers(1, 700), st.integers(0, 500))
def test_noticing_every_round_late_gives_the_same_rounds(
    policy: Policy, num_prompt_tokens: int, num_tokens: int, first_chunk: int
) -> None:
    """A scheduler that hears of tokens one step later (async) decides the same rounds."""
    assume(policy.interval > 1)
    assume(first_chunk < policy.request_budget(num_prompt_tokens) + policy.interval)
    in_time: list[Round] = []
    late: list[Round] = []
    evicted_in_time = evicted_late = 0
    for num_committed in range(first_chunk, first_chunk + num_tokens):
        due = policy.due_round(num_committed, evicted_in_time, num_prompt_tokens)
        if due is not None:
            in_time.append(due)
            evicted_in_time = due.num_evicted_after
        trigger = evicted_late + policy.request_budget(num_prompt_tokens) + policy.interval
        if num_committed == trigger:
            continue
        due = policy.due_round(num_committed, evicted_late, num_prompt_tokens)
        if due is not None:
            late.append(due)
            evicted_late = due.num_evicted_after
    assert late == in_time[: len(late)]
    assert len(in_time) - len(late) <= 1


@given(policies(), prompts, chunks)
def test_a_chunked_prefill_never_holds_more_than_the_bound(
    policy: Policy, num_prompt_tokens: int, chunk_sizes: list[int]
) -> None:
    """A round is decided before the next chunk's blocks are taken; what is held then is bounded,
    in tokens and in blocks."""
    num_committed = num_evicted = 0
    for chunk_size in chunk_sizes:
        due = policy.due_round(num_committed, num_evicted, num_prompt_tokens)
        num_evicted = due.num_evicted_after if due is not None else num_evicted
        held = num_committed + chunk_size - num_evicted
        bound = policy.max_cached_tokens(chunk_size)
        if bound is None:
            assert policy.protect == "all_prompt"
            bound = policy.request_budget(num_prompt_tokens) + policy.interval + chunk_size
        assert held < bound
        num_blocks = ceil_to_block(num_committed + chunk_size, policy.block_size) - num_evicted
        assert num_blocks <= ceil_to_block(bound, policy.block_size)
        num_committed += chunk_size


def test_a_prompt_eight_times_the_budget_stays_bounded_while_it_is_prefilled() -> None:
    rounds = play(DEFAULT, 8 * 2048, [512] * 32)
    assert [due.nominal_boundary for due in rounds] == list(range(2560, 8 * 2048 + 1, 512))
    assert all(due.nominal_boundary - due.num_evicted_after == 2048 for due in rounds)
    assert rounds[-1].first_candidate == 16


@pytest.mark.parametrize(
    ("protect", "num_prompt_tokens", "prefix"),
    [
        ("prompt", 1024, 1024),
        ("prompt", 1025, 16),
        ("prompt", 100_000, 16),
        ("prompt", 5, 16),
        ("all_prompt", 100_000, 100_000),
        ("all_prompt", 5, 16),
        ("sinks", 1000, 16),
        (200, 1000, 200),
        (200, 5, 200),
        (0, 1000, 16),
    ],
)
def test_the_protected_prefix_follows_its_rule_and_always_holds_the_sinks(
    protect: Protect | int, num_prompt_tokens: int, prefix: int
) -> None:
    policy = replace(DEFAULT, protect=protect)
    assert policy.protected_prefix(num_prompt_tokens) == prefix
    assert prefix >= policy.sink_tokens


@given(policies(), prompts)
def test_the_protected_prefix_is_within_what_start_up_reckons_with(
    policy: Policy, num_prompt_tokens: int
) -> None:
    prefix = policy.protected_prefix(num_prompt_tokens)
    on_top = policy.request_budget(num_prompt_tokens) - policy.budget
    assert policy.sink_tokens <= prefix
    assert prefix - on_top <= policy.max_protected_prefix()


@pytest.mark.parametrize(
    ("protect", "num_prompt_tokens", "window"),
    [
        ("prompt", 100, 512),
        ("prompt", 100_000, 512),
        ("sinks", 100, 512),
        (1000, 100, 512),
        ("all_prompt", 400, (2048 + 400) // 4),
        ("all_prompt", 5, (2048 + 16) // 4),
        ("all_prompt", 2048, 1024),
        ("all_prompt", 100_000, 1024),
    ],
)
def test_a_quarter_of_what_is_kept_is_the_window_and_at_most_half_of_the_budget(
    protect: Protect | int, num_prompt_tokens: int, window: int
) -> None:
    policy = replace(DEFAULT, protect=protect)
    assert policy.request_window(num_prompt_tokens) == window
    due = policy.due_round(num_prompt_tokens + 4096, 0, num_prompt_tokens)
    assert due is not None
    assert due.nominal_boundary - window - 16 < due.end_candidate <= due.nominal_boundary - window


@given(policies(), prompts)
def test_every_window_is_between_the_smallest_and_the_largest(
    policy: Policy, num_prompt_tokens: int
) -> None:
    window = policy.request_window(num_prompt_tokens)
    assert policy.min_window() <= window <= policy.max_window()
    assert policy.min_window() in {policy.request_window(length) for length in range(3)}
    assert policy.max_window() == policy.request_window(10**6)


def test_under_all_prompt_the_budget_counts_generated_tokens_only() -> None:
    policy = replace(DEFAULT, protect="all_prompt")
    assert policy.due_round(5000 + 2175, 0, 5000) is None
    due = policy.due_round(5000 + 2176, 0, 5000)
    assert due is not None
    assert due.first_candidate == 5000
    assert policy.max_cached_tokens(512) is None


@given(
    policy=policies(),
    protect=st.integers(0, 500),
    num_prompt_tokens=prompts,
    num_committed=st.integers(0, 3000),
)
def test_more_protected_tokens_than_budget_is_an_error_and_drops_nothing(
    policy: Policy, protect: int, num_prompt_tokens: int, num_committed: int
) -> None:
    """Start-up sees it in min_survivors; were that missed, the round itself refuses."""
    policy = replace(policy, budget=policy.budget % 100 + 1, protect=protect)
    if protect > policy.budget:
        assert policy.min_survivors() <= 0
    try:
        outcome: Round | str | None = policy.due_round(num_committed, 0, num_prompt_tokens)
    except RoundError as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert policy.min_survivors() < 0
        assert "min_survivors() must be positive" in outcome
    elif outcome is not None:
        assert outcome.num_survivors >= 0
        assert outcome.first_candidate <= outcome.end_candidate - outcome.num_newly_evicted


def test_the_last_survivor_is_where_rounds_begin_to_refuse() -> None:
    """96 candidates less one block of 16 leave room for 80 protected tokens, and no more."""
    policy = Policy(budget=100, interval=10, window=5, sink_tokens=4, protect=80, block_size=16)
    assert policy.due_round(110, 0, 1) == Round(110, 0, 16, 80, 96, 0)
    with pytest.raises(RoundError, match="81 protected tokens, a window of 5 and a budget of 100"):
        replace(policy, protect=81).due_round(110, 0, 1)


def test_the_policy_needs_no_torch() -> None:
    """The scheduler's process decides rounds; nothing here may pull tensors into it."""
    code = "import sys; import triattention_vllm.method.policy; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
