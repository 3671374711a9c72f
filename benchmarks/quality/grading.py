"""Right or wrong, and how sure a share of right answers is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    """exact: every word of the answer is right. right_words: words before the first wrong one,
    as a share of the answer."""

    exact: bool
    right_words: float


def grade(expected: Sequence[int], found: Sequence[int]) -> Grade:
    """Compare an answer with the one right answer, word by word, its end included."""
    right = 0
    while right < min(len(expected), len(found)) and expected[right] == found[right]:
        right += 1
    exact = right == len(expected) == len(found)
    return Grade(exact, right / len(expected))


def wilson(num_right: int, num_all: int) -> tuple[float, float]:
    """Wilson's interval for a share, 95 %: z = 1.96.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    z, share = 1.96, num_right / num_all
    scale = 1 + z * z / num_all
    centre = (share + z * z / (2 * num_all)) / scale
    spread = math.sqrt(share * (1 - share) / num_all + (z / (2 * num_all)) ** 2)
    half = z * spread / scale
    return max(0.0, centre - half), min(1.0, centre + half)
