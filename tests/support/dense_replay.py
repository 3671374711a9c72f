"""A compressed sequence in float64: rounds decided by the policy, survivors chosen here.

The score is summed the long way, offset by offset, in complex arithmetic from the reference's own
keys; nothing of the package's scoring, selection or movement is used. Where an engine's own choice
is given, the replay checks that it is a best choice up to rounding, and goes on with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from dense_models import DenseRotary
from dense_reference import DenseReference, DenseRun
from torch import Tensor

from triattention_vllm.method.policy import Policy, Round

OFFSETS = [2**power for power in range(17)]
SELECTIONS = ("per_head", "per_layer_per_head", "union")


class QueryStatistics(Protocol):
    """What the score needs: float32 [L, H, F], and [L, H, D] for unrotated dims."""

    @property
    def centre_real(self) -> Tensor: ...
    @property
    def centre_imag(self) -> Tensor: ...
    @property
    def magnitude(self) -> Tensor: ...
    @property
    def unrotated_mean(self) -> Tensor: ...


RawScores = Callable[[DenseRun, Tensor, Round], Tensor]
"""Raw scores float64 [L, H, T] of the candidates at positions [L, H_kv, T] in a round; H may be the
number of KV heads."""


@dataclass(frozen=True)
class Step:
    """One engine step of the request: tokens [start, end) are computed, and the rounds are decided
    at ``committed`` tokens (fewer than ``start`` where steps are scheduled ahead)."""

    start: int
    end: int
    committed: int


@dataclass(frozen=True)
class ReplayedRound:
    """kept: positions [L, H_kv, C'] of all tokens still cached after the round; survivors: int64
    [L, H_kv, K] of them, the chosen candidates."""

    round: Round
    kept: Tensor
    survivors: Tensor


@dataclass
class Replay:
    """logprobs: float64 [computed tokens, vocab]; row i predicts token i + 1."""

    logprobs: Tensor
    rounds: list[ReplayedRound] = field(default_factory=list)


def engine_steps(num_computed: int, num_prompt: int, max_chunk: int | None = None) -> list[Step]:
    """Prompt in chunks of ``max_chunk`` tokens, then a token a step."""
    chunk = max_chunk or num_prompt
    steps = []
    for start in range(0, num_prompt, chunk):
        steps.append(Step(start, min(start + chunk, num_prompt), start))
    for start in range(num_prompt, num_computed):
        steps.append(Step(start, start + 1, start))
    return steps


def steps_of(starts: Sequence[int], num_computed: int) -> list[Step]:
    """The steps that computed tokens began at ``starts``, each decided at what it found: nothing
    in the first one, which begins behind a prefix hit without a round."""
    ends = [*starts[1:], num_computed]
    steps = [
        Step(start, end, start if i else 0)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    return [Step(0, starts[0], 0), *steps] if starts[0] else steps


def replay(
    reference: DenseReference,
    tokens: Sequence[int],
    *,
    num_prompt: int,
    policy: Policy,
    statistics: QueryStatistics | RawScores,
    selection: str = "per_head",
    steps: Sequence[Step] | None = None,
    kept_log: Sequence[Tensor] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    tolerance: float = 1e-4,
    num_stages: int = 1,
    redundancy: int = 50,
) -> Replay:
    """Compute ``tokens`` (all that the engine computed: without the last one generated).

    statistics: what the score is made from, or another method's scores.
    steps: defaults to the whole prompt in one step, then single tokens.
    kept_log: the engine's choice of each round in order, int64 [L, H_kv, kept]: ascending token
    indices inside the round's region, which begins at the block of the first candidate.
    num_stages: pipeline stages of as many layers each, over which ``per_head`` takes its mean.
    groups: rows that share their choices; all compressed layers where None.
    redundancy: percent of ``redundancy_of`` that is taken off; an engine's without settings.
    Raises AssertionError where such a choice is no best choice to ``tolerance`` (in units of
    ``max(1, largest score)``), or the number of rounds differs.
    """
    run = reference.start()
    all_tokens = torch.as_tensor(tokens)
    steps = engine_steps(len(all_tokens), num_prompt) if steps is None else steps
    groups = [range(len(run.compressed_rows))] if groups is None else groups
    result = Replay(torch.empty(0))
    logprobs = []
    num_evicted = 0
    begin = end = 0
    for step in steps:
        due = policy.due_round(step.committed, num_evicted, num_prompt)
        if due is not None:
            if end > begin:
                logprobs.append(run.extend(all_tokens[begin:end]))
                begin = end
            choice = None
            if kept_log is not None:
                assert len(result.rounds) < len(kept_log), (
                    f"a round is due at {step.committed} tokens, which the engine did not run"
                )
                choice = kept_log[len(result.rounds)]
            result.rounds.append(
                _run_round(
                    run,
                    due,
                    statistics,
                    selection,
                    policy.block_size,
                    choice,
                    groups,
                    tolerance,
                    num_stages,
                    redundancy / 100,
                )
            )
            num_evicted = due.num_evicted_after
        assert step.start == end, "steps must follow each other"
        end = step.end
    logprobs.append(run.extend(all_tokens[begin:end]))
    if kept_log is not None:
        assert len(kept_log) == len(result.rounds), (
            f"the engine ran {len(kept_log)} rounds, the policy asks for {len(result.rounds)}"
        )
    result.logprobs = torch.cat(logprobs)
    return result


def _run_round(
    run: DenseRun,
    due: Round,
    statistics: QueryStatistics | RawScores,
    selection: str,
    block_size: int,
    choice: Tensor | None,
    groups: Sequence[Sequence[int]],
    tolerance: float,
    num_stages: int,
    redundancy: float,
) -> ReplayedRound:
    """Choose survivors (or check ``choice``) and hide every other candidate in ``run``."""
    rows = run.compressed_rows
    num_kv_heads = run.visible.shape[1]
    visible = run.visible[rows]
    cached = visible.nonzero()[:, 2].view(len(rows), num_kv_heads, -1)  # ascending positions
    candidates = cached[:, :, due.first_candidate : due.end_candidate]
    if callable(statistics):
        raw = statistics(run, candidates, due)
    else:
        raw = _scores_of(run, candidates, statistics, due.nominal_boundary)
    less = redundancy * redundancy_of(gathered(run.values[rows], candidates))
    scores = torch.empty(candidates.shape, dtype=torch.float64)
    for own in map(list, groups):
        scores[own] = combine(raw[own], candidates[own], less[own], selection, num_stages)
    if choice is None:
        chosen = _best(scores, due.num_survivors)
    else:
        chosen = _chosen_candidates(choice, due, block_size)
    margin = _margin(scores, chosen)
    allowed = tolerance * max(1.0, float(scores.abs().max()))
    assert margin >= -allowed, (
        f"round at {due.nominal_boundary}: an evicted token scores {-margin:.3g} above a kept one"
    )
    survivors = candidates.gather(2, chosen)
    visible.scatter_(2, candidates, False)
    visible.scatter_(2, survivors, True)
    run.visible = run.visible.index_copy(0, torch.tensor(rows), visible)
    kept = visible.nonzero()[:, 2].view(len(rows), num_kv_heads, -1)
    return ReplayedRound(due, kept, survivors)


def _scores_of(
    run: DenseRun, candidates: Tensor, statistics: QueryStatistics, boundary: int
) -> Tensor:
    """Raw scores float64 [L, H, T] of the cached keys at ``candidates`` [L, H_kv, T]."""
    model = run.model
    group = model.num_heads // model.num_kv_heads
    rows = run.compressed_rows
    keys = gathered(run.keys[rows], candidates).repeat_interleave(group, 1)  # [L, H, T, D]
    scores = []
    for idx, row in enumerate(rows):
        rotary = model.rotary_of(model.attention_layers[row])
        scores.append(triattention_scores(keys[idx], rotary, statistics, idx, boundary))
    return torch.stack(scores)


def gathered(cached: Tensor, candidates: Tensor) -> Tensor:
    """Keys or values [L, H_kv, n, D] of the candidates at positions [L, H_kv, T]."""
    return cached.gather(2, candidates.unsqueeze(-1).expand(-1, -1, -1, cached.shape[-1]))


def redundancy_of(values: Tensor) -> Tensor:
    """``r(t) = log(1 + sum over u > t of max(0, cos(v_t, v_u))^8)`` of values [L, H_kv, T, D], one
    token after the other; returns [L, H_kv, T]."""
    lengths = values.norm(dim=-1)
    found = torch.zeros_like(lengths)
    for token in range(values.shape[2] - 1):
        own, later = values[:, :, token, None], values[:, :, token + 1 :]
        product = lengths[:, :, token, None] * lengths[:, :, token + 1 :]
        cosine = (own * later).sum(-1) / product.clamp_min(1e-300)
        found[:, :, token] = cosine.clamp_min(0).pow(8).sum(-1)
    return (1 + found).log()


def triattention_scores(
    keys: Tensor, rotary: DenseRotary, statistics: QueryStatistics, idx: int, boundary: int
) -> Tensor:
    """``s(k) = mean_d sum_f Re[qbar_f conj(k'_f) exp(i w_f (T + d))] + sum_f (a_f - |qbar_f|)
    |k'_f| + sum_d E[q_d] k_d`` for one layer's keys after RoPE, float64 [H, T, D], and row ``idx``
    of the statistics; returns [H, T]."""
    frequency = rotary.inv_freq.double()
    num = len(frequency)
    real, imag = statistics.centre_real[idx], statistics.centre_imag[idx]
    centre = torch.complex(real.double(), imag.double())[:, :num]
    magnitude = statistics.magnitude[idx].double()[:, :num]
    pairs = rotary.pairs(keys)  # [H, T, F]
    product = centre.unsqueeze(1) * pairs.conj()
    total = torch.zeros(keys.shape[:-1], dtype=torch.float64)
    for offset in OFFSETS:
        angle = frequency * (boundary + offset)
        total += (product * torch.polar(torch.ones_like(angle), angle)).real.sum(-1)
    total /= len(OFFSETS)
    total += ((magnitude - centre.abs()).unsqueeze(1) * pairs.abs()).sum(-1)
    unrotated = statistics.unrotated_mean[idx].double()[..., rotary.rotary_dim :]
    return total + (unrotated.unsqueeze(1) * keys[..., rotary.rotary_dim :]).sum(-1)


def combine(
    raw: Tensor, candidates: Tensor, less: Tensor, selection: str, num_stages: int = 1
) -> Tensor:
    """z-normalise per query head, take the best of each group and ``less`` off it, then share by
    ``selection``.

    raw [L, H, T], candidates: positions [L, H_kv, T], less: [L, H_kv, T]; returns [L, H_kv, T].
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}; known are {SELECTIONS}.")
    mean = raw.mean(-1, keepdim=True)
    deviation = (raw - mean).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    scores = ((raw - mean) / deviation).unflatten(1, (less.shape[1], -1)).amax(2) - less
    if selection == "per_head":
        of_stages = candidates.unflatten(0, (num_stages, -1))
        assert (of_stages == of_stages[:, :1]).all(), "one keep set per KV head in all layers"
        scores = scores.unflatten(0, (num_stages, -1))
        scores = scores.mean(1, keepdim=True).expand_as(scores).flatten(0, 1)
    elif selection == "union":
        assert (candidates == candidates[:1, :1]).all(), "one keep set everywhere"
        scores = scores.amax((0, 1), keepdim=True).expand_as(scores)
    return scores


def _best(scores: Tensor, num_survivors: int) -> Tensor:
    """Indices of the highest scores, ascending; ties go to the later token. [L, H_kv, K]"""
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    later_first = scores.shape[-1] - 1 - order
    return later_first[..., :num_survivors].sort(-1).values


def _chosen_candidates(choice: Tensor, due: Round, block_size: int) -> Tensor:
    """Candidate indices [L, H_kv, K] of an engine's region indices (see ``replay``)."""
    num_leading = due.first_candidate % block_size
    leading = torch.arange(num_leading).expand(*choice.shape[:2], -1)
    assert torch.equal(choice[..., :num_leading], leading), "a protected token was evicted"
    chosen = choice[..., num_leading:] - num_leading
    assert chosen.shape[-1] == due.num_survivors, (
        f"{chosen.shape[-1]} survivors, the policy asks for {due.num_survivors}"
    )
    num_candidates = due.end_candidate - due.first_candidate
    lowest, highest = int(chosen.min()), int(chosen.max())
    assert 0 <= lowest <= highest < num_candidates, (
        f"candidates {lowest} to {highest} were kept, of {num_candidates}"
    )
    assert (chosen.diff(dim=-1) > 0).all(), "survivors must be in order, each of them once"
    return chosen


def _margin(scores: Tensor, chosen: Tensor) -> float:
    """Worst kept minus best evicted, over all layers and heads."""
    is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, chosen, True)
    worst_kept = scores.masked_fill(~is_kept, torch.inf).amin(-1)
    best_evicted = scores.masked_fill(is_kept, -torch.inf).amax(-1)
    return float((worst_kept - best_evicted).min())
