"""Long addition: long numbers added to a sum, digit by digit with the carry, again and again.

    prompt   <bos> add  a 7 b 3 ;  n5 4 a n8 ;  n8 9 b n7 ;  n7 1 a n3 ;  n3 0 b n5 ;  start n5 ?
    answer   n5 4 a 7 a 1 1   n8 9 b 3 b 3 1   n7 1 a 1 a 2 0   n3 0 b 3 b 3 0   n5 4 a 2 ...

Column ``a`` is the last digit. A cell ``name digit column next`` holds one digit of an addend; the
cells of an addend follow one another from its last digit on, and behind the last cell of all comes
the first one again. The answer reads a cell and its column of the sum (written one addend ago) and
writes the column's new digit and the carry. A carry out of the first column is dropped. The trace
is as long as it is asked for, and sums that come back to what they were are not used.
"""

from random import Random

from quality.tasks.problem import Answer, Problem, Turn
from quality.vocabulary import BOS, LETTERS, SYMBOLS

WORDS_PER_CELL = 5
MAX_COLUMNS = 16
MAX_TRIES = 1000


def generate(rng: Random, length: int) -> Problem:
    """A problem of exactly ``length`` words."""
    most_cells = max(4, min(len(SYMBOLS), length // 3 // WORDS_PER_CELL))
    for _ in range(MAX_TRIES):
        num_columns = rng.randint(2, max(2, min(MAX_COLUMNS, most_cells // 3)))
        num_addends = rng.randint(1, most_cells // num_columns)
        found = _run(rng, LETTERS[:num_columns], num_addends, length)
        if found is not None:
            return found
    raise ValueError(f"no sum without a repeated state in {MAX_TRIES} tries at length {length}")


def _run(rng: Random, columns: tuple[str, ...], num_addends: int, length: int) -> Problem | None:
    """A problem with random numbers, or None where its sum repeats itself."""
    total = {column: rng.randrange(10) for column in columns}
    names = rng.sample(SYMBOLS, num_addends * len(columns))
    cells = {
        name: (rng.randrange(10), columns[idx % len(columns)], names[(idx + 1) % len(names)])
        for idx, name in enumerate(names)
    }
    prompt = [BOS, "add"]
    for column, digit in total.items():
        prompt += [column, str(digit)]
    prompt.append(";")
    for name in rng.sample(names, len(names)):
        digit, column, following = cells[name]
        prompt += [name, str(digit), column, following, ";"]
    name, carry = names[0], 0
    prompt += ["start", name, "?"]
    answer = Answer()
    states = set()
    while len(prompt) + len(answer.words) < length:
        digit, column, following = cells[name]
        if column == columns[0]:
            state = (name, *total.values())
            if state in states:
                return None
            states.add(state)
            carry = 0
        answer.memory(name, str(digit), column, str(total[column]))
        carry, total[column] = divmod(digit + total[column] + carry, 10)
        answer.form(column)
        answer.hard(str(total[column]), str(carry))
        name = following
    answer.cut(len(prompt) + len(answer.words) - length)
    return Problem("add", [Turn(prompt, answer)])
