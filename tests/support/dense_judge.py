"""Whether everything that an engine answered is what the dense float64 reference computes.

The reference replays each life of each observed request with the engine's own steps, so chunks,
prefix hits, preemptions and steps that were scheduled ahead are judged alike.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from dense_reference import DenseReference
from dense_replay import RawScores, Replay, Step, replay
from observed_engine import Life, Observed

from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Statistics

FLOAT32_ERROR = 1e-4
"""Largest error of a log-probability in float32, over 4 layers and some hundred steps of the
recurrence that generation is; full attention alone reaches a third of it."""


@dataclass
class Judge:
    """statistics: or, of a method that has none, the scores of a request's life. settings: without
    a calibration text. num_stages: of pipeline parallelism. masked: a grammar
    had taken tokens out before the engine normalised, so that only differences between
    log-probabilities are the model's own. tolerance: of the choice of survivors, as in ``replay``.
    """

    dense: DenseReference
    statistics: Statistics | Callable[[Life], RawScores]
    settings: Settings
    block_size: int
    masked: bool = False
    num_stages: int = 1
    tolerance: float = 1e-4

    def check(self, requests: Iterable[Observed]) -> int:
        """Every log-probability of every request; returns how many were compared."""
        return sum(self.check_one(request) for request in requests)

    def check_one(self, request: Observed) -> int:
        """Raises AssertionError where the engine's log-probability is not the reference's, or a
        round kept what is no best choice, or where there is nothing to compare."""
        compared = sum(self.compare(request, *answer) for answer in self.answers(request))
        assert compared, f"{request.request_id} has no log-probabilities"
        return compared

    def largest_error(self, request: Observed) -> float:
        """Largest difference of a log-probability, for an engine that rounds more than float32; NaN
        where any is.

        Raises AssertionError where a round kept what is no best choice to ``tolerance``.
        """
        errors = [
            abs(float(result.logprobs[position - 1, token]) - value)
            for logprobs, result, position in self.answers(request)
            for token, value in logprobs.items()
        ]
        return float(torch.tensor(errors).max())

    def answers(self, request: Observed) -> Iterator[tuple[dict[int, float], Replay, int]]:
        """The log-probabilities of each position, and the replay of the life that they are of."""
        replays = [self.replay(request, life) for life in request.lives]
        for idx, logprobs in enumerate(request.logprobs):
            position = request.num_prompt + idx
            of_life = [
                result
                for life, result in zip(request.lives, replays, strict=True)
                if any(step.sampled and step.end == position for step in life.steps)
            ]
            assert of_life, f"no step of {request.request_id} chose the token at {position}"
            yield logprobs, of_life[-1], position
        for position, logprobs in request.prompt_logprobs.items():
            yield logprobs, replays[0], position

    def replay(self, request: Observed, life: Life) -> Replay:
        """The reference over one life; what came from the prefix cache had seen everything."""
        tokens = request.token_ids
        seen = [step for step in life.steps if step.end <= len(tokens)]
        steps = [Step(step.start, step.end, step.committed) for step in seen]
        if life.num_hits:
            steps.insert(0, Step(0, life.num_hits, 0))
        num_rounds = sum(step.had_round for step in seen)
        return replay(
            self.dense,
            tokens[: steps[-1].end],
            num_prompt=request.num_prompt,
            policy=self.settings.policy(self.block_size),
            statistics=self.statistics(life) if callable(self.statistics) else self.statistics,
            selection=self.settings.selection,
            steps=steps,
            kept_log=[joined(kept, self.num_stages) for kept in life.kept[:num_rounds]],
            num_stages=self.num_stages,
            tolerance=self.tolerance,
            redundancy=self.settings.redundancy,
        )

    def compare(
        self, request: Observed, logprobs: dict[int, float], result: Replay, position: int
    ) -> int:
        """One position of the engine against the reference."""
        allowed = {token: value for token, value in logprobs.items() if value != -torch.inf}
        exact = {token: float(result.logprobs[position - 1, token]) for token in allowed}
        shift = 0.0
        if self.masked:
            first = next(iter(allowed))
            shift = allowed[first] - exact[first]
        for token, value in allowed.items():
            assert abs(exact[token] + shift - value) < FLOAT32_ERROR, (
                f"{request.request_id}, token {token} at {position}: {value} instead of "
                f"{exact[token] + shift}"
            )
        return len(allowed)


def joined(of_ranks: Sequence[torch.Tensor], num_stages: int) -> torch.Tensor:
    """What all ranks kept, [L, H_kv, kept]; ranks of a stage hold heads, stages hold layers."""
    size = len(of_ranks) // num_stages
    stages = [torch.cat(list(of_ranks[i : i + size]), 1) for i in range(0, len(of_ranks), size)]
    return torch.cat(stages)
