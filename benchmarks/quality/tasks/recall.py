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


def generate(rng: Random, length: int) -> Problem:
    """A problem of at most ``length`` words, at least 100, that asks every now and then."""
    keys, weights = _keys(rng)
    latest: dict[str, str] = {}
    turns: list[Turn] = []
    room = length - 2
    most_asked = 2 * MAX_ASKED
    cost_of_asking = 3 + 3 * most_asked
    prompt = [BOS, "recall"]
    while room >= cost_of_asking + 2:
        entries = (room - cost_of_asking) // 2
        most = rng.choice((0, 1, 2, 4, 10)) if turns else rng.randint(2, max(2, length // 3))
        entries = min(entries, most)
        prompt += _updates(rng, keys, weights, entries, latest)
        turn = ask(rng, prompt, latest, most_asked)
        room -= 2 * entries + len(turn.answer.words) + len(turn.answer.words) // 2 + 2
        turns.append(turn)
        prompt = []
    return Problem("recall", turns)


def unbroken(rng: Random, length: int, num_questions: int | None = None) -> Problem:
    """A problem of at most ``length`` words (at least 128) whose updates come in one stream, with
    so many questions behind it; None: one or several."""
    keys, weights = _keys(rng)
    if num_questions is None:
        num_questions = one_or_several(rng, length)
    room = length - num_questions * (3 + 3 * MAX_ASKED) - 2
    latest: dict[str, str] = {}
    prompt = [BOS, "recall", *_updates(rng, keys, weights, room // 2, latest)]
    return Problem("recall", ask_again(rng, prompt, latest, num_questions))


def one_or_several(rng: Random, length: int) -> int:
    """Questions behind a text of ``length`` words."""
    return rng.choice((1, min(MAX_QUESTIONS, length // WORDS_PER_ASKING)))


def ask_again(
    rng: Random, prompt: list[str], values: dict[str, str], num_questions: int
) -> list[Turn]:
    """Turns that ask one after the other; the first has the prompt."""
    first = ask(rng, prompt, values)
    return [first, *(ask(rng, [], values) for _ in range(num_questions - 1))]


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
