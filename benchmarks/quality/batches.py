"""Training batches: problems of all tasks, padded to one length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from quality.tasks import addition, copying, dfs, machine, needle, recall
from quality.tasks.problem import HARD_WEIGHT, Problem
from quality.vocabulary import IDS, PAD
from quality.vocabulary import TASKS as JUDGED
from torch import Tensor

GENERATORS: Mapping[str, Callable[[Random, int], Problem]] = {
    "dfs": dfs.generate,
    "machine": machine.generate,
    "recall": recall.generate,
    "needle": needle.generate,
    "add": addition.generate,
    "copy": copying.generate,
    "dense": partial(dfs.generate, extras=(4, 7, 10)),
    "changed": partial(machine.generate, changed_weight=HARD_WEIGHT),
    "unbroken": recall.unbroken,
    "scattered": needle.scattered,
}
WARM_UP_LENGTH = 256
WARM_UP_ROWS = (5, 1, 2, 5, 3, 1, 5, 2, 0, 5, 3, 4)
"""Tasks of the rows of short problems: a third is copying."""
LONG = 0.75
"""A late row's problem has at least this share of its length, as the test's have,"""
LATE_TRIES = 12
"""or is the longest of so many."""
NOT_LEARNED = -100
TASKS = tuple(GENERATORS)


@dataclass(frozen=True)
class Batch:
    """ids [B, T]; labels [B, T]: the next word where it belongs to an answer, else NOT_LEARNED;
    weights [B, T]: how much a label counts, 0 where there is none;
    graded bool [B, T]: labels that depend on memory; tasks: of each row, an index into TASKS."""

    ids: Tensor
    labels: Tensor
    weights: Tensor
    graded: Tensor
    tasks: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on this device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def rows(self, which: Tensor | slice) -> "Batch":
        """These rows only."""
        return Batch(**{name: tensor[which] for name, tensor in vars(self).items()})


def make_batch(
    seed: int,
    step: int,
    num_rows: int,
    length: int,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    late: Sequence[int] = (),
) -> Batch:
    """A rank's rows of the batch of a step: the same for the same arguments.

    Tasks take turns over the rows of all ranks, ``late`` ones (indices into TASKS) instead of the
    usual ones; which one is first is drawn.
    """
    usual = WARM_UP_ROWS if length <= WARM_UP_LENGTH else tuple(range(len(JUDGED)))
    order = late or usual
    first = Random(f"{seed} {step}").randrange(len(order)) + rank
    rng = Random(f"{seed} {step} {rank}")
    ids = torch.full((num_rows, length), IDS[PAD])
    labels = torch.full((num_rows, length), NOT_LEARNED)
    weights = torch.zeros((num_rows, length))
    graded = torch.zeros((num_rows, length), dtype=torch.bool)
    tasks = [order[(first + row * num_ranks) % len(order)] for row in range(num_rows)]
    for row, task in enumerate(tasks):
        place = 0
        generate = GENERATORS[TASKS[task]]
        problem = _long(rng, length, generate) if late else generate(rng, length)
        for turn in problem.turns:
            words = [IDS[word] for word in turn.prompt + turn.answer.words]
            first = place + len(turn.prompt)
            end = place + len(words)
            ids[row, place:end] = torch.tensor(words)
            labels[row, first - 1 : end - 1] = ids[row, first:end]
            weights[row, first - 1 : end - 1] = torch.tensor(turn.answer.weights)
            graded[row, first - 1 : end - 1] = torch.tensor(turn.answer.graded)
            place = end
    # Every row weighs the same: tasks with short answers as much as those with long ones. Late,
    # where long answers are wrong in one word of a thousand, such a word would go under.
    weights /= weights.sum(dim=1, keepdim=True)
    if late:
        weights *= (labels != NOT_LEARNED).float().mean(dim=1, keepdim=True).sqrt()
    return Batch(ids, labels, weights, graded, torch.tensor(tasks))


def _long(rng: Random, length: int, generate: Callable[[Random, int], Problem]) -> Problem:
    tries: list[Problem] = []
    while len(tries) < LATE_TRIES:
        tries.append(generate(rng, length))
        if tries[-1].num_words >= LONG * length:
            return tries[-1]
    return max(tries, key=lambda problem: problem.num_words)
