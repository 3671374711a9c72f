"""Needles in a haystack: short facts at any depth of a text that says nothing.

prompt   <bos> needle  n5 n17 n3 ... a 4 0 7 n8 ... ? a !
answer   a 4 0 7 <eos>
"""

from random import Random

from quality.tasks.problem import Problem, Turn
from quality.tasks.recall import MAX_ASKED, ask, ask_again, one_or_several
from quality.vocabulary import BOS, DIGITS, LETTERS, SYMBOLS

VALUE_DIGITS = 3
WORDS_PER_NEEDLE = 1 + VALUE_DIGITS
WORDS_PER_QUESTION = 3 + MAX_ASKED * (1 + WORDS_PER_NEEDLE)


def generate(rng: Random, length: int) -> Problem:
    """A problem of at most ``length`` words (at least 128) that asks every now and then."""
    prompt, values, turns = [BOS, "needle"], dict[str, str](), list[Turn]()
    keys = rng.sample(LETTERS, len(LETTERS))
    room = length - len(prompt)
    dense = rng.choice((0.02, 0.05, 0.2, 0.4))
    while room >= 24 + WORDS_PER_QUESTION:
        most = room - WORDS_PER_QUESTION - WORDS_PER_NEEDLE
        num_words = min(most, rng.randint(4, max(4, length // 3)) if turns else length // 2)
        words: list[str] = []
        while len(words) < num_words:
            if keys and (not values or rng.random() < dense):
                key = keys.pop()
                values[key] = _value(rng)
                words += [key, *values[key].split()]
            words.append(rng.choice(SYMBOLS))
        turn = ask(rng, prompt + words, values)
        turns.append(turn)
        room -= len(turn.prompt) - len(prompt) + len(turn.answer.words)
        prompt = []
    return Problem("needle", turns)


def scattered(rng: Random, length: int) -> Problem:
    """A problem of at most ``length`` words (at least 128) whose needles lie anywhere in one
    haystack, one of them often at its very end, with one question behind it or several."""
    depths = [rng.random() for _ in range(rng.choice((1, 1, 2, 4, 8, 16)))]
    if rng.random() < 0.5:
        depths[0] = 1.0
    num_questions = one_or_several(rng, length)
    room = length - num_questions * WORDS_PER_QUESTION - 2
    num_filler = room - len(depths) * WORDS_PER_NEEDLE
    prompt, values = _haystack(rng, num_filler, depths)
    return Problem("needle", ask_again(rng, prompt, values, num_questions))


def at_depths(rng: Random, length: int, depths: list[float]) -> Problem:
    """One question for the needles at ``depths`` (0 first word, 1 last) of ``length`` words."""
    num_filler = length - len(depths) * (2 * WORDS_PER_NEEDLE + 1) - 6
    words, values = _haystack(rng, num_filler, depths)
    return Problem("needle", [ask(rng, words, values)])


def _haystack(
    rng: Random, num_filler: int, depths: list[float]
) -> tuple[list[str], dict[str, str]]:
    """The words with a needle at each depth, and the needles' values."""
    keys = rng.sample(LETTERS, len(depths))
    values = {key: _value(rng) for key in keys}
    places = sorted(zip((round(depth * num_filler) for depth in depths), keys, strict=True))
    words = [BOS, "needle"]
    for idx in range(num_filler + 1):
        for place, key in places:
            if place == idx:
                words += [key, *values[key].split()]
        if idx < num_filler:
            words.append(rng.choice(SYMBOLS))
    return words, values


def _value(rng: Random) -> str:
    return " ".join(rng.choices(DIGITS, k=VALUE_DIGITS))
