"""What one request may ask for: a budget of its own, or no compression.

The values come from clients (``vllm_xargs``, ``SamplingParams.extra_args``), so nothing about
them is taken for granted, and what is echoed of them is short.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import Repr
from typing import Any, Self

from triattention_vllm.config import OFF, Settings
from triattention_vllm.errors import RequestError, SettingsError
from triattention_vllm.method.policy import Policy, ceil_div
from triattention_vllm.method.scorers import num_observed_queries

PREFIX = "kv_"
BUDGET_KEY = "kv_budget"
METHOD_KEY = "kv_compression"
OWN_KEYS = (BUDGET_KEY, METHOD_KEY)
VLLM_KEYS = ("kv_transfer_params", "kv_cache_report_mode")
"""Keys with our prefix that vLLM itself puts among a request's extra arguments."""

_ECHO = Repr()
_ECHO.maxlevel = 1


@dataclass(frozen=True)
class RequestSettings:
    """What a request asks for; with neither, the server's own settings.

    budget: tokens to keep, in the place of the server's. off: never compressed.
    """

    budget: int | None = None
    off: bool = False

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[Any, object] | None) -> Self:
        """Parse a request's extra arguments; keys without our prefix are not looked at.

        Raises RequestError for an unknown key, a wrong type, or two that contradict each other.
        """
        given = {
            key: value
            for key, value in (extra_args or {}).items()
            if isinstance(key, str) and key.startswith(PREFIX) and key not in VLLM_KEYS
        }
        for key in given:
            if key not in OWN_KEYS:
                known = ", ".join(OWN_KEYS)
                raise RequestError(f"{_ECHO.repr(key)} is unknown; known are {known}.", PREFIX)
        method = given.get(METHOD_KEY, OFF)
        if not isinstance(method, str) or method != OFF:
            raise RequestError(
                f'{METHOD_KEY} is {_ECHO.repr(method)}, allowed is "{OFF}"; leave it out to be '
                "compressed as the server is set up.",
                METHOD_KEY,
            )
        budget = given.get(BUDGET_KEY)
        if BUDGET_KEY in given and type(budget) is not int:
            found = f"{_ECHO.repr(budget)} ({type(budget).__name__})"
            raise RequestError(
                f"{BUDGET_KEY} is {found}, allowed is a whole number of tokens.", BUDGET_KEY
            )
        if METHOD_KEY in given and BUDGET_KEY in given:
            raise RequestError(
                f"{BUDGET_KEY} and {METHOD_KEY} contradict each other; leave one of them out.",
                METHOD_KEY,
            )
        assert budget is None or isinstance(budget, int)
        return cls(budget=budget, off=METHOD_KEY in given)

    def policy(self, server: Policy) -> Policy | None:
        """The rounds of this request, or None where it has none."""
        if self.off:
            return None
        return server if self.budget is None else replace(server, budget=self.budget)


def without_own_keys(extra_args: Mapping[Any, object]) -> dict[Any, object]:
    """The extra arguments that are not about KV compression."""
    return {
        key: value
        for key, value in extra_args.items()
        if not isinstance(key, str) or not key.startswith(PREFIX) or key in VLLM_KEYS
    }


@dataclass(frozen=True)
class Capacity:
    """What one engine can hold of one request, in the blocks of compressed layers.

    num_blocks: the pool, without vLLM's null block. max_in_flight_tokens: tokens scheduled and
    not yet committed, at most. num_lookahead_tokens: slots for drafts behind the last token.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_in_flight_tokens: int
    num_lookahead_tokens: int = 0

    def most_tokens(self, settings: Settings) -> int:
        """Largest ``kv_budget``, and longest request without compression, in tokens."""
        pool = self.num_blocks * self.block_size
        if settings.max_request_budget is None:
            return max(settings.budget, pool // 2)
        return min(settings.max_request_budget, pool)

    def check_budget(self, asked: RequestSettings, settings: Settings) -> None:
        """Raise RequestError for a budget that no request of this server may have."""
        if asked.budget is None:
            return
        try:
            own = replace(settings, budget=asked.budget, max_request_budget=None)
            own.check_block_size(self.block_size)
        except SettingsError as error:
            raise RequestError(f"{BUDGET_KEY} cannot be served: {error}", BUDGET_KEY) from None
        num_queries = num_observed_queries(settings.method)
        if own.min_window < num_queries:
            raise RequestError(
                f"{BUDGET_KEY} {asked.budget} gives a window of {own.min_window} tokens, and "
                f'method "{settings.method}" looks at the last {num_queries}; ask for more.',
                BUDGET_KEY,
            )
        most = min(self.most_tokens(settings), self.max_model_len)
        if asked.budget > max(most, settings.budget):
            raise RequestError(
                f"{BUDGET_KEY} is {asked.budget}, allowed here is at most {most} tokens.",
                BUDGET_KEY,
            )

    def check_length(
        self, asked: RequestSettings, settings: Settings, num_prompt_tokens: int, max_tokens: int
    ) -> None:
        """Raise RequestError where the request would hold more than it may, or than there is.

        num_prompt_tokens, max_tokens: the request's prompt and its longest answer.
        """
        if asked == RequestSettings():
            return
        total = min(num_prompt_tokens + max_tokens, self.max_model_len)
        most = self.most_tokens(settings)
        if asked.off and total > most:
            left = most - num_prompt_tokens
            smaller = f"set max_tokens to at most {left}, or " if left > 0 else ""
            raise RequestError(
                f'{METHOD_KEY} "{OFF}" keeps all tokens of the request, up to {total} '
                f"({num_prompt_tokens} of the prompt and max_tokens), and allowed here are {most}; "
                f"{smaller}leave {METHOD_KEY} out.",
                METHOD_KEY,
            )
        policy = asked.policy(settings.policy(self.block_size))
        held = min(total + self.num_lookahead_tokens, self.max_model_len)
        if policy is not None:
            bound = policy.request_budget(num_prompt_tokens) + policy.interval
            held = min(held, bound + self.max_in_flight_tokens)
        num_held = ceil_div(held, self.block_size)
        if num_held > self.num_blocks:
            key = METHOD_KEY if asked.off else BUDGET_KEY
            raise RequestError(
                f"{key}: the request would hold up to {num_held} blocks of {self.block_size} "
                f"tokens, and the server has {self.num_blocks}; ask for less.",
                key,
            )
