"""Which rounds may be compacted in place in one launch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from triattention_kernels import ArgumentError, forward_groups, moves_forward


@pytest.mark.parametrize(
    ("sources", "destinations", "expected"),
    [
        ([[1, 2, 3]], [[1, 2]], True),  # in place
        ([[1, 2, 3]], [[1, 9]], True),  # a private block for a shared one
        ([[1, 2, 3]], [[2, 1]], False),  # own blocks at other places
        ([[1, 2, 3]], [[3]], False),
        ([[1, 2], [3, 4]], [[1], [3]], True),
        ([[1, 2], [3, 4]], [[1], [2]], False),  # what another request reads
        ([[1, 2], [1, 4]], [[9], [1]], False),  # shared, and written by one of them
        ([[1, 2], [1, 4]], [[9], [8]], True),  # shared, and copied by both
        ([], [], True),
    ],
)
def test_only_rounds_that_slide_forward_share_an_in_place_launch(sources, destinations, expected):
    assert moves_forward(sources, destinations) is expected


def test_a_block_that_is_given_out_again_begins_a_new_launch():
    sources = [[1, 2, 3], [4, 5], [6, 7], [8]]
    destinations = [[1, 2], [3], [6], [8]]  # the second request got block 3 of the first
    assert forward_groups(sources, destinations) == [range(1), range(1, 4)]
    assert forward_groups(sources, [[1], [4], [6], [8]]) == [range(4)]
    assert forward_groups([], []) == []


@given(data=st.data())
def test_every_group_moves_forward_and_none_begins_too_early(data):
    """Rounds in the order of planning: blocks that one released may be taken by a later one."""
    free = list(range(50, 100))
    sources = [[10 * r + idx for idx in range(data.draw(st.integers(1, 4)))] for r in range(4)]
    destinations = []
    for source in sources:
        destination = list(source[: data.draw(st.integers(1, len(source)))])
        for idx in range(len(destination)):
            if data.draw(st.booleans()):
                destination[idx] = free.pop()
        destinations.append(destination)
        free += [block for block in source if block not in destination]
    groups = forward_groups(sources, destinations)
    assert [request for group in groups for request in group] == [0, 1, 2, 3]
    for group in groups:
        of_group = slice(group.start, group.stop)
        assert moves_forward(sources[of_group], destinations[of_group])
        longer = slice(group.start, group.stop + 1)
        if group.stop < 4:
            assert not moves_forward(sources[longer], destinations[longer])


def test_an_order_in_which_writes_come_before_reads_is_refused():
    with pytest.raises(ArgumentError, match="request 1 reads blocks .*order of their planning"):
        forward_groups([[4, 5], [1, 2, 3]], [[3], [1, 2]])


def test_a_round_that_takes_its_own_blocks_again_is_a_launch_of_its_own():
    sources = [[1, 2], [3, 4, 5], [6, 7]]
    destinations = [[1], [9, 3], [6]]  # the second request got its first block as its second
    assert forward_groups(sources, destinations) == [range(1), range(1, 2), range(2, 3)]
    assert not moves_forward(sources[1:2], destinations[1:2])
    assert forward_groups([[1, 2]], [[2]]) == [range(1)]
