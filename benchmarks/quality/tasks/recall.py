"""A long stream of updates, asked for the latest value of keys near and far.

    prompt   <bos> recall  a n5 b n9 a n2 ... ? a b !
    answer   a n2 b n9 <eos>

Some keys are updated all the time and others almost never, so that values to be recalled lie a few
words back or thousands.
"""

from collections.abc import Sequence
from random import Random

from quality.tasks.problem import Answer, Problem, Turn
from quality.vocabulary import BOS, LETTERS, SYMBOLS

MAX_ASKED = 4
MAX_QUESTIONS = 8
WORDS_PER_ASKING = 64
"""Behind a stream of fewer words for each, fewer questions are asked."""


def generate(rng: Random, length: int, num_turns: int | None = None) -> Problem:
    """A problem of at most ``length`` words, at least 100.

    num_turns: 1 asks at the end only; None asks every now and then, many answers to learn from.
    """
    keys, weights = _keys(rng)
    latest: dict[str, str] = {}
    turns: list[Turn] = []
    room = length - 2
    most_asked = MAX_ASKED if num_turns is not None else 2 * MAX_ASKED
    cost_of_asking = 3 + 3 * most_asked
    prompt = [BOS, "recall"]
    while room >= cost_of_asking + 2:
        entries = (room - cost_of_asking) // 2
        if num_turns is None and turns:
            entries = min(entries, rng.choice((0, 1, 2, 4, 10)))
        elif num_turns is None:
            entries = min(entries, rng.randint(2, max(2, length // 3)))
        prompt += _updates(rng, keys, weights, entries, latest)
        turn = ask(rng, prompt, latest, most_asked)
        room -= 2 * entries + len(turn.answer.words) + len(turn.answer.words) // 2 + 2
        turns.append(turn)
        prompt = []
        if num_turns is not None and len(turns) == num_turns:
            break
    return Problem("recall", turns)


def unbroken(rng: Random, length: int) -> Problem:
    """A problem of at most ``length`` words (at least 128) whose updates come in one stream, with
    one question behind it or several."""
    keys, weights = _keys(rng)
    num_questions = rng.choice((1, min(MAX_QUESTIONS, length // WORDS_PER_ASKING)))
    room = length - num_questions * (3 + 3 * MAX_ASKED) - 2
    latest: dict[str, str] = {}
    prompt = [BOS, "recall", *_updates(rng, keys, weights, room // 2, latest)]
    turns = []
    for _ in range(num_questions):
        turns.append(ask(rng, prompt, latest))
        prompt = []
    return Problem("recall", turns)


def ask(
    rng: Random, prompt: list[str], values: dict[str, str], most_asked: int = MAX_ASKED
) -> Turn:
    """A turn that asks for the values of up to ``most_asked`` keys."""
    asked = rng.sample(list(values), min(len(values), rng.randint(1, most_asked)))
    answer = Answer()
    for key in asked:
        answer.form(key)
        answer.memory(*values[key].split())
    answer.end()
    return Turn([*prompt, "?", *asked, "!"], answer)


def _keys(rng: Random) -> tuple[list[str], list[float]]:
    """Keys, and how often each is updated."""
    keys = rng.sample(LETTERS, rng.randint(4, len(LETTERS)))
    skew = rng.choice((1, 2, 3, 5))
    return keys, [rng.random() ** skew + 1e-4 for _ in keys]


def _updates(
    rng: Random,
    keys: Sequence[str],
    weights: Sequence[float],
    num_entries: int,
    latest: dict[str, str],
) -> list[str]:
    words: list[str] = []
    for key in rng.choices(keys, weights, k=num_entries):
        latest[key] = rng.choice(SYMBOLS)
        words += [key, latest[key]]
    return words
