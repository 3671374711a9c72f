"""Long addition: many numbers added to a running sum, column by column, with the carry.

    prompt   <bos> add  = a 7 b 3 ;  n5 : a 4 b 9 ;  n8 : a 1 b 0 ;  ?
    answer   n5 : 4 a 7 a 1 1   9 b 3 b 3 1 ;  n8 : 1 a 1 a 2 0   0 b 3 b 3 0 ;  <eos>

Column ``a`` is the last digit. Each column of the answer reads the addend's digit, then the sum's
(written once per addend, so an addend ago), and writes the sum's new digit and the carry. A carry
out of the first column is dropped.
"""

from random import Random

from quality.tasks.problem import Answer, Problem, Turn
from quality.vocabulary import BOS, LETTERS, SYMBOLS


def generate(rng: Random, length: int) -> Problem:
    """A problem of at most ``length`` words, at least 60."""
    num_columns = rng.randint(2, max(2, min(16, length // 60)))
    columns = LETTERS[:num_columns]
    fixed = 5 + 2 * num_columns
    per_addend = (3 + 2 * num_columns) + (3 + 6 * num_columns)
    num_addends = max(1, min(len(SYMBOLS), (length - fixed) // per_addend))
    total = [rng.randrange(10) for _ in columns]
    addends = {
        name: [rng.randrange(10) for _ in columns] for name in rng.sample(SYMBOLS, num_addends)
    }
    prompt = [BOS, "add", "=", *_number(columns, total), ";"]
    for name, digits in addends.items():
        prompt += [name, ":", *_number(columns, digits), ";"]
    prompt.append("?")
    answer = Answer()
    for name, digits in addends.items():
        answer.memory(name)
        answer.form(":")
        carry = 0
        for idx, column in enumerate(columns):
            answer.memory(str(digits[idx]))
            answer.form(column)
            answer.memory(str(total[idx]))
            carry, total[idx] = divmod(digits[idx] + total[idx] + carry, 10)
            answer.form(column)
            answer.memory(str(total[idx]), str(carry))
        answer.form(";")
    answer.end()
    return Problem("add", [Turn(prompt, answer)])


def _number(columns: tuple[str, ...], digits: list[int]) -> list[str]:
    return [word for pair in zip(columns, map(str, digits), strict=True) for word in pair]
