"""Grades and intervals."""

import pytest
from quality.grading import Grade, grade, wilson


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1, 2, 3, 4], Grade(True, 1.0)),
        ([1, 2, 9, 4], Grade(False, 0.5)),
        ([1, 2, 3], Grade(False, 0.75)),
        ([1, 2, 3, 4, 5], Grade(False, 1.0)),
        ([], Grade(False, 0.0)),
    ],
)
def test_an_answer_is_right_to_the_last_word_or_wrong(found: list[int], expected: Grade) -> None:
    assert grade([1, 2, 3, 4], found) == expected


def test_wilson_intervals_are_those_of_the_tables() -> None:
    """Against published values of the score interval without continuity correction."""
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
