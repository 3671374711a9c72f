"""What one request may ask for, whatever a client sends."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triattention_vllm.config import Settings
from triattention_vllm.errors import RequestError
from triattention_vllm.method.policy import Policy
from triattention_vllm.request import VLLM_KEYS, Capacity, RequestSettings, without_own_keys

SETTINGS = Settings(budget=256, interval=64, window=32, protect=64)
POOL = Capacity(num_blocks=127, block_size=32, max_model_len=8192, max_in_flight_tokens=512)
"""127 blocks of 32 are 4064 tokens, so a request may keep 2032 of its own."""

WRONG: list[tuple[dict[Any, object], str]] = [
    ({"kv_budget": "4096"}, r"kv_budget is '4096' \(str\), allowed is a whole number of tokens"),
    ({"kv_budget": 4096.0}, r"kv_budget is 4096.0 \(float\), allowed"),
    ({"kv_budget": True}, r"kv_budget is True \(bool\), allowed"),
    ({"kv_budget": None}, r"kv_budget is None \(NoneType\), allowed"),
    ({"kv_budget": [512]}, r"kv_budget is \[512\] \(list\), allowed"),
    ({"kv_budget": "9" * 10**6}, r"kv_budget is '999+\.\.\.9+' \(str\), allowed"),
    ({"kv_compression": "on"}, "kv_compression is 'on', allowed is \"off\"; leave it out"),
    ({"kv_compression": False}, "kv_compression is False, allowed"),
    ({"kv_compression": None}, "kv_compression is None, allowed"),
    ({"kv_compression": ["off"]}, r"kv_compression is \['off'\], allowed"),
    ({"kv_budgets": 512}, "'kv_budgets' is unknown; known are kv_budget, kv_compression"),
    ({"kv_": 1}, "'kv_' is unknown"),
    ({"kv_budget": 512, "kv_compression": "off"}, "contradict each other"),
]
UNSERVABLE: list[tuple[int, str]] = [
    (-1, "budget is -1, allowed is a whole number of tokens, at least 1"),
    (0, "budget is 0, allowed"),
    (95, "budget 95 is below window 32 .* set it to at least 97 tokens"),
    (100, "budget 100 leaves no candidate .* set budget to 128 or more"),
    (2033, "kv_budget is 2033, allowed here is at most 2032 tokens"),
    (2**63, f"kv_budget is {2**63}, allowed here is at most 2032 tokens"),
]


@pytest.mark.parametrize(("extra_args", "message"), WRONG)
def test_a_wrong_value_is_refused_shortly_and_by_name(
    extra_args: dict[Any, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        RequestSettings.from_extra_args(extra_args)
    assert refused.value.key.startswith("kv_")
    assert len(str(refused.value)) < 200
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(("budget", "message"), UNSERVABLE)
def test_a_budget_that_no_request_may_have_is_refused(budget: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        POOL.check_budget(RequestSettings(budget=budget), SETTINGS)


def test_a_budget_whose_window_is_shorter_than_what_the_method_looks_at_is_refused() -> None:
    settings = Settings(method="h2o", budget=512, interval=32)
    POOL.check_budget(RequestSettings(budget=128), settings)
    with pytest.raises(RequestError, match='127 gives a window of 31 .*"h2o" looks at the last 32'):
        POOL.check_budget(RequestSettings(budget=127), settings)
    POOL.check_budget(RequestSettings(budget=127), replace(settings, method="tova"))


def test_a_request_that_asks_for_nothing_has_the_servers_policy() -> None:
    server = SETTINGS.policy(32)
    others: dict[Any, object] = {"kv_transfer_params": {}, "kv_cache_report_mode": "full", 7: "x"}
    for extra_args in (None, {}, {"budget": "x"}, others):
        asked = RequestSettings.from_extra_args(extra_args)
        assert asked == RequestSettings()
        assert asked.policy(server) is server
    assert without_own_keys({**others, "kv_budget": 1, "kv_other": 2}) == others


def test_a_requests_own_budget_changes_the_budget_alone() -> None:
    policy = RequestSettings.from_extra_args({"kv_budget": 512}).policy(SETTINGS.policy(32))
    assert policy == replace(SETTINGS, budget=512).policy(32)
    assert RequestSettings.from_extra_args({"kv_compression": "off"}).policy(policy) is None


def test_the_operators_limit_holds_for_budgets_and_for_requests_without_compression() -> None:
    limited = Settings(budget=256, interval=64, window=32, max_request_budget=512)
    POOL.check_budget(RequestSettings(budget=512), limited)
    with pytest.raises(RequestError, match="at most 512 tokens"):
        POOL.check_budget(RequestSettings(budget=513), limited)
    POOL.check_length(RequestSettings(off=True), limited, 12, 500)
    with pytest.raises(
        RequestError,
        match=r"up to 513 \(13 of .* are 512; set max_tokens to at most 499, or",
    ):
        POOL.check_length(RequestSettings(off=True), limited, 13, 500)
    lower_only = Settings(budget=256, interval=64, window=32, max_request_budget=256)
    POOL.check_budget(RequestSettings(budget=256), lower_only)
    with pytest.raises(RequestError, match="at most 256 tokens"):
        POOL.check_budget(RequestSettings(budget=257), lower_only)


def test_a_limit_above_the_pool_allows_what_the_pool_holds() -> None:
    generous = Settings(budget=256, interval=64, window=32, max_request_budget=10**9)
    POOL.check_length(RequestSettings(off=True), generous, 64, 4000)
    with pytest.raises(RequestError, match="up to 4065 .* allowed here are 4064"):
        POOL.check_length(RequestSettings(off=True), generous, 64, 4001)


def test_a_chunk_in_flight_must_fit_on_top_of_a_requests_own_budget() -> None:
    """127 blocks hold 4064 tokens: budget + interval 64 + 512 in flight."""
    generous = Settings(budget=256, interval=64, window=32, max_request_budget=10**9)
    POOL.check_length(RequestSettings(budget=3488), generous, 5000, 3000)
    with pytest.raises(RequestError, match="kv_budget: .* up to 128 blocks .* server has 127"):
        POOL.check_length(RequestSettings(budget=3489), generous, 5000, 3000)
    POOL.check_length(RequestSettings(budget=3489), generous, 100, 50)


def test_a_prompt_that_is_kept_on_top_of_the_budget_counts() -> None:
    settings = Settings(budget=256, interval=64, window=32, protect="all_prompt")
    POOL.check_length(RequestSettings(budget=512), settings, 2900, 5000)
    with pytest.raises(RequestError, match="would hold up to"):
        POOL.check_length(RequestSettings(budget=512), settings, 3100, 5000)


@given(
    budget=st.integers(-(2**70), 2**70) | st.integers(0, 3000),
    num_prompt_tokens=st.integers(1, 8000),
    max_tokens=st.integers(1, 10**6),
    most=st.none() | st.integers(256, 10_000),
    off=st.booleans(),
)
def test_what_is_accepted_has_rounds_that_keep_something_and_fits(
    budget: int, num_prompt_tokens: int, max_tokens: int, most: int | None, off: bool
) -> None:
    settings = Settings(budget=256, interval=64, window=32, max_request_budget=most)
    given_args = {"kv_compression": "off"} if off else {"kv_budget": budget}
    asked = RequestSettings.from_extra_args(given_args)
    try:
        POOL.check_budget(asked, settings)
        POOL.check_length(asked, settings, num_prompt_tokens, max_tokens)
    except RequestError:
        assert off or budget != settings.budget
        return
    total = min(num_prompt_tokens + max_tokens, POOL.max_model_len)
    policy = asked.policy(settings.policy(POOL.block_size))
    if policy is None:
        held = total
    else:
        assert isinstance(policy, Policy)
        assert policy.min_survivors() > 0
        held = min(total, policy.budget + policy.interval + POOL.max_in_flight_tokens)
    assert held <= POOL.num_blocks * POOL.block_size


@given(
    key=st.sampled_from(["kv_budget", "kv_compression", "kv_other", "kv_transfer_params"])
    | st.text().map("kv_{}".format),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("off"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=5,
    ),
)
def test_anything_a_client_sends_is_understood_or_refused(key: str, value: object) -> None:
    message = ""
    try:
        asked = RequestSettings.from_extra_args({key: value, "other": value})
        POOL.check_budget(asked, SETTINGS)
        POOL.check_length(asked, SETTINGS, 100, 100)
    except RequestError as error:
        message = str(error)
    assert len(message) < 400
    understood = (type(value) is int and value >= 97) or value == "off"
    assert bool(message) or understood or key in VLLM_KEYS
