"""Rows without their null head: torch, Triton and Python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triattention_kernels import ArgumentError, shift_rows
from triton_runs import run_triton

POISON = -7


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def shifted(rows: list[list[int]], seq_lens: list[int], block_size: int, **options) -> tuple:
    """(table, lengths) in poisoned buffers one row and column larger, the same from both."""
    found = []
    for implementation in ("torch", "triton"):
        table = torch.full((len(rows) + 1, len(rows[0]) + 1), POISON, dtype=torch.int32)
        lengths = torch.full((len(rows) + 1,), POISON, dtype=torch.int32)
        arguments = (int32(rows), int32(seq_lens), block_size, table, lengths)
        if implementation == "triton":
            _, arguments = run_triton(
                "triattention_kernels:shift_rows",
                *arguments,
                implementation=implementation,
                **options,
            )
        else:
            shift_rows(*arguments, **options)
        assert arguments[0].tolist() == rows
        assert arguments[1].tolist() == seq_lens
        found.append((arguments[3].tolist(), arguments[4].tolist()))
    assert found[0] == found[1]
    return found[0]


def oracle(rows, seq_lens, block_size, null_below) -> tuple:
    width = len(rows[0])
    table, lengths = [], []
    for row, seq_len in zip(rows, seq_lens, strict=True):
        num_null = 0
        while num_null < max(seq_len - 1, 0) // block_size and row[num_null] < null_below:
            num_null += 1
        seq_len -= num_null * block_size
        needed = row[num_null : num_null + -(-seq_len // block_size)]
        table.append(needed + [POISON] * (width + 1 - len(needed)))
        lengths.append(seq_len)
    return [*table, [POISON] * (width + 1)], [*lengths, POISON]


def test_the_null_head_is_dropped_by_hand():
    table, lengths = shifted([[0, 0, 5, 6, 9, 9], [3, 4, 9, 9, 9, 9]], [13, 8], 4)
    assert table[0] == [5, 6, POISON, POISON, POISON, POISON, POISON]
    assert table[1] == [3, 4, POISON, POISON, POISON, POISON, POISON]
    assert lengths == [5, 8, POISON]


def test_dummy_rows_that_are_all_null_keep_a_token():
    table, lengths = shifted([[0, 0, 0], [0, 0, 0], [0, 0, 0]], [12, 1, 0], 4)
    assert lengths == [4, 1, 0, POISON]
    assert [row[:2] for row in table[:3]] == [[0, POISON], [0, POISON], [POISON, POISON]]


def test_a_split_manager_block_has_several_null_ids():
    table, lengths = shifted([[0, 1, 0, 1, 6, 7, 2, 3]], [31], 4, null_below=2)
    assert table[0][:5] == [6, 7, 2, 3, POISON]
    assert lengths[0] == 15


def test_only_the_columns_that_the_host_allows_are_looked_at():
    rows, lengths = [[0, 5, 6, 99]], [10]
    expected = oracle(rows, lengths, 4, 1)
    assert shifted(rows, lengths, 4, max_seq_len=11) == expected


def test_long_rows_are_shifted_over_several_tiles():
    rows = [[0] * 2500 + list(range(1, 1801)), list(range(1, 4301))]
    seq_lens = [4300 * 16 - 3, 4200 * 16]
    assert shifted(rows, seq_lens, 16) == oracle(rows, seq_lens, 16, 1)


@settings(max_examples=40)
@given(data=st.data())
def test_any_rows_are_shifted_as_with_lists(data):
    block_size = data.draw(st.integers(1, 4), "block_size")
    width = data.draw(st.integers(1, 6), "width")
    null_below = data.draw(st.integers(1, 3), "null_below")
    row = st.lists(st.integers(0, 5), min_size=width, max_size=width)
    rows = data.draw(st.lists(row, min_size=1, max_size=4), "rows")
    seq_lens = [data.draw(st.integers(0, width * block_size), "seq_len") for _ in rows]
    found = shifted(rows, seq_lens, block_size, null_below=null_below)
    assert found == oracle(rows, seq_lens, block_size, null_below)


def test_no_rows_are_no_error():
    table, lengths = torch.zeros((2, 4), dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for implementation in ("torch", "triton"):
        run_triton(
            "triattention_kernels:shift_rows",
            *(table[:0], lengths[:0], 16, table, lengths),
            implementation=implementation,
        )
        assert not table.any(), "nothing is written"
        assert not lengths.any()


@pytest.mark.parametrize(
    ("message", "place", "bad"),
    [
        ("block_table is int64", 0, torch.zeros(2, 4, dtype=torch.int64)),
        (r"seq_lens has shape \[3\]", 1, torch.zeros(3, dtype=torch.int32)),
        ("block_size is 0", 2, 0),
        (r"out_table has shape \[2, 3\].*at least \[2, 4\]", 3, torch.zeros(2, 3).int()),
        (r"out_seq_lens *\[1\]; at least", 4, torch.zeros(1).int()),
        ("out_table has strides", 3, torch.zeros(4, 4).int().T),
    ],
)
def test_buffers_that_do_not_fit_are_refused(message, place, bad):
    arguments = [torch.zeros(2, 4).int(), torch.zeros(2).int(), 16]
    arguments += [torch.zeros(2, 4).int(), torch.zeros(2).int()]
    arguments[place] = bad
    with pytest.raises(ArgumentError, match=message):
        shift_rows(*arguments)
