"""A threshold with hysteresis over a sequence of needs: integers and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from triattention_vllm.method.pressure import Pressure


@st.composite
def thresholds(draw: st.DrawFn) -> Pressure:
    start = draw(st.integers(1, 100))
    return Pressure(start=start, stop=draw(st.integers(0, start)))


def test_rounds_begin_above_start_and_end_at_stop_worked_out_by_hand() -> None:
    pressure = Pressure(start=90, stop=80)
    answers = []
    is_on = False
    for needed in (89, 90, 91, 85, 81, 80, 85, 90, 91, 120, 0):
        is_on = pressure.is_on(is_on, needed, 100)
        answers.append(is_on)
    assert answers == [
        *(False, False, True, True, True),
        *(False, False, False, True, True, False),
    ]


@given(thresholds(), st.integers(1, 1000), st.lists(st.integers(0, 1500), max_size=50))
def test_rounds_never_run_at_or_below_stop_and_always_above_start(
    pressure: Pressure, num_blocks: int, needs: list[int]
) -> None:
    is_on = False
    for needed in needs:
        was_on, is_on = is_on, pressure.is_on(is_on, needed, num_blocks)
        percent = 100 * needed / num_blocks
        if percent > pressure.start:
            assert is_on
        elif percent <= pressure.stop:
            assert not is_on
        else:
            assert is_on == was_on, "between the thresholds nothing changes"


@given(thresholds(), st.booleans(), st.integers(0, 500), st.integers(0, 500), st.integers(1, 300))
def test_more_need_never_ends_rounds(
    pressure: Pressure, was_on: bool, less: int, more: int, num_blocks: int
) -> None:
    less, more = sorted((less, more))
    assert pressure.is_on(was_on, less, num_blocks) <= pressure.is_on(was_on, more, num_blocks)
