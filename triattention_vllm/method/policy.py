"""When a round is due, what is protected, and how many blocks go: integers only.

The scheduler decides rounds with these functions alone. Nothing here knows a score, a tensor
or vLLM, so the same inputs give the same rounds in every process.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from triattention_vllm.errors import RoundError

Protect = Literal["prompt", "all_prompt", "sinks"]
Window = Literal["quarter"]


def floor_to_block(num_tokens: int, block_size: int) -> int:
    """Largest multiple of ``block_size`` that is not above ``num_tokens``."""
    return num_tokens // block_size * block_size


def ceil_div(count: int, size: int) -> int:
    """How many parts of ``size`` hold ``count``: the quotient, rounded up."""
    return -(-count // size)


def ceil_to_block(num_tokens: int, block_size: int) -> int:
    """Smallest multiple of ``block_size`` that is not below ``num_tokens``."""
    return ceil_div(num_tokens, block_size) * block_size


@dataclass(frozen=True)
class Round:
    """One round of one request. Token indices are *physical*: they count cached tokens, so
    index 0 is the first token behind the null head.

    nominal_boundary: ``N*``, logical; the position of the next query for the score.
    num_evicted_before, num_evicted_after: ``E`` and ``E'``, multiples of the block size.
    first_candidate: ``P``, the protected prefix.
    end_candidate: ``P0 - E``, a multiple of the block size.
    num_survivors: ``K``; candidates minus newly evicted tokens.
    """

    nominal_boundary: int
    num_evicted_before: int
    num_evicted_after: int
    first_candidate: int
    end_candidate: int
    num_survivors: int

    @property
    def num_newly_evicted(self) -> int:
        """Tokens that this round evicts, a multiple of the block size."""
        return self.num_evicted_after - self.num_evicted_before


@dataclass(frozen=True)
class Policy:
    """Budget ``B``, interval ``I`` and window ``W`` in tokens, for blocks of ``block_size``.

    window: a quarter is one of all that a request keeps, and never more than half of ``budget``.
    """

    budget: int
    interval: int
    window: Window | int
    sink_tokens: int
    protect: Protect | int
    block_size: int

    def protected_prefix(self, num_prompt_tokens: int) -> int:
        """``P`` of a request: the number of its first tokens that are never evicted."""
        if self.protect == "all_prompt":
            return max(num_prompt_tokens, self.sink_tokens)
        if self.protect == "prompt" and 2 * num_prompt_tokens <= self.budget:
            return max(num_prompt_tokens, self.sink_tokens)
        if isinstance(self.protect, int):
            return max(self.protect, self.sink_tokens)
        return self.sink_tokens

    def request_budget(self, num_prompt_tokens: int) -> int:
        """``B`` of a request: under ``all_prompt`` the prompt is kept on top of the budget."""
        if self.protect == "all_prompt":
            return self.budget + max(num_prompt_tokens, self.sink_tokens)
        return self.budget

    def window_of(self, num_kept: int) -> int:
        """``W`` of a request that keeps so many tokens."""
        if isinstance(self.window, int):
            return self.window
        return min(num_kept // 4, self.budget // 2)

    def request_window(self, num_prompt_tokens: int) -> int:
        """``W`` of a request. Where a prompt is kept on top of the budget, the window grows with
        it, and half of the budget remains for survivors however long the prompt is."""
        return self.window_of(self.request_budget(num_prompt_tokens))

    def due_round(
        self, num_committed: int, num_evicted: int, num_prompt_tokens: int
    ) -> Round | None:
        """The round that is due at ``num_committed`` logical tokens, or None.

        Everything follows from the nominal boundary ``N* = E + B + I + k*I``, the largest
        that is not above ``num_committed``, and not from the moment at which it is noticed.
        Raises RoundError where protected tokens and window leave no room in the budget.
        """
        budget = self.request_budget(num_prompt_tokens)
        overdue = num_committed - (num_evicted + budget + self.interval)
        if overdue < 0:
            return None
        boundary = num_committed - overdue % self.interval
        evicted_after = ceil_to_block(boundary - budget, self.block_size)
        window = self.request_window(num_prompt_tokens)
        end_candidate = floor_to_block(boundary - window, self.block_size) - num_evicted
        first_candidate = self.protected_prefix(num_prompt_tokens)
        num_survivors = end_candidate - first_candidate - (evicted_after - num_evicted)
        if num_survivors < 0:
            raise RoundError(
                f"{first_candidate} protected tokens, a window of {window} and a budget of "
                f"{budget} leave no room for survivors at {boundary} tokens; "
                "Policy.min_survivors() must be positive: raise the budget or protect less"
            )
        return Round(
            nominal_boundary=boundary,
            num_evicted_before=num_evicted,
            num_evicted_after=evicted_after,
            first_candidate=first_candidate,
            end_candidate=end_candidate,
            num_survivors=num_survivors,
        )

    def max_protected_prefix(self) -> int:
        """Largest ``P`` that any request takes out of its budget."""
        if self.protect == "all_prompt":
            return 0
        if self.protect == "prompt":
            return max(self.budget // 2, self.sink_tokens)
        if isinstance(self.protect, int):
            return max(self.protect, self.sink_tokens)
        return self.sink_tokens

    def min_window(self) -> int:
        """Smallest ``W`` of any request."""
        return self.request_window(0)

    def max_window(self) -> int:
        """Largest ``W`` of any request."""
        return self.window_of((2 if self.protect == "all_prompt" else 1) * self.budget)

    def min_survivors(self) -> int:
        """Fewest survivors of any round of any request; must be positive (checked at start)."""
        extra = 0 if self.protect != "all_prompt" else self.block_size - 1
        fewest = None
        for num_intervals in range(1, self.block_size + 1):
            new = num_intervals * self.interval
            region = floor_to_block(self.budget + new - self.max_window(), self.block_size)
            survivors = region - ceil_to_block(new, self.block_size) - extra
            fewest = survivors if fewest is None else min(fewest, survivors)
        assert fewest is not None
        return fewest - self.max_protected_prefix()

    def least_budget(self) -> int:
        """Smallest ``B`` with ``B >= W + I``."""
        if isinstance(self.window, int):
            return self.window + self.interval
        return (self.interval - 1) * 4 // 3 + 1

    def enough_budget(self) -> int:
        """A ``B`` from which on every one leaves candidates, no larger than it has to be.

        Searched downwards from ``B >= W + P`` and three blocks for rounding, where a protected
        prompt takes half of it and the window a number of tokens or a share.
        """
        fixed = 3 * self.block_size
        share = 0.0
        if isinstance(self.window, int):
            fixed += self.window
        else:
            share = 0.5 if self.protect == "all_prompt" else 0.25
        sinks = max(self.sink_tokens, self.protect if isinstance(self.protect, int) else 0)
        with_prompt = fixed / (0.5 - share) if self.protect == "prompt" else 0
        enough = max(ceil(max((fixed + sinks) / (1 - share), with_prompt)), self.least_budget())
        while enough > self.least_budget() and self._leaves_candidates(enough - 1):
            enough -= 1
        return enough

    def _leaves_candidates(self, budget: int) -> bool:
        return replace(self, budget=budget).min_survivors() > 0

    def max_cached_tokens(self, num_in_flight_tokens: int) -> int | None:
        """Most tokens that a request holds at once when no round is deferred, or None where
        nothing bounds it (``all_prompt``: a prompt may be as long as the model allows).

        Between rounds ``C < B + I``; on top come tokens scheduled but not yet committed.
        """
        if self.protect == "all_prompt":
            return None
        return self.budget + self.interval + num_in_flight_tokens
