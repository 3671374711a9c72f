"""Attention reads the row behind its null head, and nothing else of it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from triattention_vllm.engine.attention import shift_rows


def shifted_by_hand(row: list[int], seq_len: int, block_size: int) -> tuple[list[int], int]:
    """The same in plain Python: (blocks that attention reads, cached tokens)."""
    num_blocks = -(-seq_len // block_size)
    row = row[:num_blocks]
    while len(row) > 1 and row[0] == 0:
        row = row[1:]
        seq_len -= block_size
    return row, seq_len


rows_of_requests = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3)),
    min_size=1,
    max_size=5,
)


@given(requests=rows_of_requests, block_size=st.sampled_from([1, 4, 32]))
def test_each_row_loses_its_null_head_and_as_many_tokens(
    requests: list[tuple[int, int, int, int]], block_size: int
) -> None:
    width = 16
    block_table = torch.full((len(requests), width), 99, dtype=torch.int32)
    seq_lens = torch.empty(len(requests), dtype=torch.int32)
    for r, (num_null, num_real, last_tokens, _) in enumerate(requests):
        row = [0] * num_null + list(range(10 * r + 1, 10 * r + 1 + num_real))
        block_table[r, : len(row)] = torch.tensor(row, dtype=torch.int32)
        seq_lens[r] = (len(row) - 1) * block_size + min(last_tokens, block_size)
    before = block_table.clone(), seq_lens.clone()
    shifted = shift_rows(block_table, seq_lens, block_size, int(seq_lens.max()))
    assert torch.equal(block_table, before[0])
    assert torch.equal(seq_lens, before[1])
    assert shifted.seq_lens.dtype == seq_lens.dtype
    for r in range(len(requests)):
        row, seq_len = shifted_by_hand(block_table[r].tolist(), int(seq_lens[r]), block_size)
        assert int(shifted.seq_lens[r]) == seq_len
        assert shifted.block_table[r, : len(row)].tolist() == row


def test_dummy_and_padded_rows_keep_at_least_one_token() -> None:
    block_table = torch.zeros((3, 8), dtype=torch.int32)
    seq_lens = torch.tensor([1, 32, 0], dtype=torch.int32)
    shifted = shift_rows(block_table, seq_lens, 4, 32)
    assert shifted.seq_lens.tolist() == [1, 4, 0]
    assert shifted.block_table.max() == 0


def test_a_row_that_was_never_compressed_is_not_changed() -> None:
    """Regression: a request that started before its compressed neighbour got its row shifted."""
    block_table = torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]], dtype=torch.int32)
    shifted = shift_rows(block_table, torch.tensor([15, 16], dtype=torch.int32), 4, 16)
    assert shifted.block_table[1].tolist() == [3, 4, 5, 6]
    assert shifted.seq_lens.tolist() == [7, 16]
    assert shifted.block_table[0, :2].tolist() == [7, 8]
