"""Copying, which nothing is judged by: the quickest way to learn to look back.

prompt   <bos> >  n5 n17 n3 ...  >
answer   n5 n17 n3 ...  >  n5 n17 n3 ... <eos>
"""

from random import Random

from quality.tasks.problem import Answer, Problem, Turn
from quality.vocabulary import BOS, DIGITS, LETTERS, SYMBOLS


def generate(rng: Random, length: int) -> Problem:
    """A problem of at most ``length`` words, at least 20: a text, twice more."""
    words = rng.choices(SYMBOLS + LETTERS + DIGITS, k=rng.randint(3, (length - 5) // 3))
    answer = Answer()
    answer.memory(*words)
    answer.form(">")
    answer.memory(*words)
    answer.end()
    return Problem("copy", [Turn([BOS, ">", *words, ">"], answer)])
