"""A register machine: run a program with jumps and write down every value read and written.

    prompt   <bos> machine  a 3 b 5 ;  n7 : a b c n9 n7 ;  n9 : c a b n7 n9 ;  start n7 ?
    answer   n7 a 3 b 5 c 8   n9 ...   n7 c 8 a 3 b 1   n7 ...

A line ``label : x y z even odd`` sets ``z = (x + y) mod 10`` and goes on at ``even`` or ``odd``,
after the parity of the new value; the ``even`` of all lines make one loop through the program. The
answer is the trace, as long as it is asked for: it has no end, so nothing depends on counting
steps. Programs that come back to a state they had are not used, since their trace could be copied.
"""

from random import Random

from quality.tasks.problem import Answer, Problem, Turn
from quality.vocabulary import BOS, LETTERS, SYMBOLS

WORDS_PER_STEP = 7
WORDS_PER_LINE = 8
MAX_TRIES = 4000


def generate(rng: Random, length: int, changed_weight: float = 1.0) -> Problem:
    """A problem of exactly ``length`` words.

    A value that is not what its line read when it last ran has the weight ``changed_weight``.
    """
    most_lines = max(4, min(26, length // 3 // WORDS_PER_LINE))
    most_registers = max(5, min(len(LETTERS), length // 20))
    for _ in range(MAX_TRIES):
        registers = rng.sample(LETTERS, rng.randint(most_registers // 2, most_registers))
        labels = rng.sample(SYMBOLS, rng.randint(3 * most_lines // 4, most_lines))
        found = _run(rng, registers, labels, length, changed_weight)
        if found is not None:
            return found
    raise ValueError(f"no program without a repeated state in {MAX_TRIES} tries at length {length}")


def _run(
    rng: Random, registers: list[str], labels: list[str], length: int, changed_weight: float
) -> Problem | None:
    """A problem with a random program, or None where its run repeats a state."""
    values = {register: rng.randrange(10) for register in registers}
    program = {
        label: (*rng.choices(registers, k=3), labels[idx - 1], rng.choice(labels))
        for idx, label in enumerate(labels)
    }
    label = rng.choice(labels)
    prompt = [BOS, "machine"]
    for register, value in values.items():
        prompt += [register, str(value)]
    prompt.append(";")
    for name, line in program.items():
        prompt += [name, ":", *line, ";"]
    prompt += ["start", label, "?"]
    answer = Answer()
    states = set()
    read: dict[str, tuple[int, int]] = {}  # by each line when it last ran
    while len(prompt) + len(answer.words) < length:
        state = (label, *values.values())
        if state in states:
            return None
        states.add(state)
        first, second, target, even, odd = program[label]
        answer.memory(label)
        before = read.get(label)
        read[label] = (values[first], values[second])
        for slot, register in enumerate((first, second)):
            answer.memory(register)
            changed = before is not None and before[slot] != values[register]
            answer.memory(str(values[register]), weight=changed_weight if changed else 1.0)
        answer.memory(target)
        values[target] = (values[first] + values[second]) % 10
        answer.hard(str(values[target]))
        label = odd if values[target] % 2 else even
    answer.cut(len(prompt) + len(answer.words) - length)
    return Problem("machine", [Turn(prompt, answer)])
