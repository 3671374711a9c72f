"""The test problems: made from a seed, or read from the public set of depth-first searches."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from quality.batches import GENERATORS, LONG
from quality.tasks import dfs, needle, recall
from quality.tasks.problem import Problem
from quality.vocabulary import SYMBOLS, TASKS

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEST_SEED = "test"
"""Training draws from seeds that are numbers, so no test problem was trained on by intent."""


def held_out_problems(task: str, length: int, num_problems: int) -> list[Problem]:
    """Problems of at most ``length`` words, and at least three quarters of it.

    recall asks once, at the end; needle goes through the depths, then asks for four at once.
    """
    problems: list[Problem] = []
    idx = 0
    while len(problems) < num_problems:
        rng = Random(f"{TEST_SEED} {task} {length} {idx}")
        problem = _problem(task, rng, length, len(problems))
        if problem.num_words >= LONG * length or idx > 50 * num_problems:
            problems.append(problem)
        idx += 1
    return problems


def _problem(task: str, rng: Random, length: int, number: int) -> Problem:
    if task == "recall":
        return recall.unbroken(rng, length, num_questions=1)
    if task == "needle":
        place = number % (len(DEPTHS) + 1)
        depths = [rng.random() for _ in range(4)] if place == len(DEPTHS) else [DEPTHS[place]]
        return needle.at_depths(rng, length, depths)
    return GENERATORS[task](rng, length)


def public_dfs_problems(path: Path, num_problems: int) -> list[Problem]:
    """The public state queries in our words: node ``i`` is the i-th symbol.

    Their searches take the smallest new neighbour, as ours take the first. Raises ValueError where
    a state that we compute is not the file's answer.
    """
    problems = []
    for entry in json.loads(path.read_text(encoding="utf-8"))[:num_problems]:
        nodes = [SYMBOLS[node] for node in sorted(entry["graph"]["nodes"])]
        edges = [(SYMBOLS[a], SYMBOLS[b]) for a, b in entry["graph"]["edges"]]
        graph, start = dfs.from_edges(nodes, edges), SYMBOLS[entry["start_node"]]
        state = list(dfs.search(graph, start))[entry["steps"]]
        _check(entry["id"], state, entry["answer"])
        problems.append(dfs.problem(graph, start, entry["steps"]))
    return problems


def _check(name: object, state: dfs.State, answer: dict[str, Sequence[int]]) -> None:
    stack = [state.node]
    while state.parents[stack[0]] != "root":
        stack.insert(0, state.parents[stack[0]])
    found = (stack, sorted(state.parents, key=SYMBOLS.index))
    expected = tuple([SYMBOLS[node] for node in answer[key]] for key in ("stack", "visited_nodes"))
    if found != expected:
        raise ValueError(f"problem {name}: stack and visited nodes are {found}, not {expected}")


def calibration_text(length: int = 1024, per_task: int = 2, tasks: Sequence[str] = TASKS) -> str:
    """Solved problems, words with spaces between them: about ten thousand."""
    words: list[str] = []
    for task in tasks:
        for idx in range(per_task):
            problem = GENERATORS[task](Random(f"calibration {task} {idx}"), length)
            for turn in problem.turns:
                words += turn.prompt + turn.answer.words
    return " ".join(words) + "\n"
