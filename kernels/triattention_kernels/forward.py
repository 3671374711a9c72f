"""Which rounds may share an in-place launch, from block ids that the host knows."""

from collections import Counter
from collections.abc import Sequence

from triattention_kernels.errors import ArgumentError

BlockRows = Sequence[Sequence[int]]


def moves_forward(source_rows: BlockRows, destination_rows: BlockRows) -> bool:
    """Whether destination block j of every request is its own source block j, or a block that
    no request reads: what ``RoundBatch.moves_forward`` promises.

    source_rows, destination_rows: block ids of each request in row order, without padding.
    """
    num_readers = Counter(block for row in source_rows for block in row)
    for source, destination in zip(source_rows, destination_rows, strict=True):
        for idx, block in enumerate(destination):
            in_place = idx < len(source) and source[idx] == block
            if num_readers[block] > int(in_place):
                return False
    return True


def forward_groups(source_rows: BlockRows, destination_rows: BlockRows) -> list[range]:
    """Runs of consecutive requests, to be executed in order; each of them ``moves_forward``, or
    is a single request that does not.

    A later request may write what an earlier one reads: blocks that a round released may be
    given out again within one step. It then begins a new run. A request that was given blocks
    of its own again, at other places, is a run of its own. Raises ArgumentError where no order
    of launches is right: a request that reads what an earlier one writes.
    """
    groups: list[range] = []
    start = 0
    read_since_start: set[int] = set()
    written: set[int] = set()
    alone = False  # whether the current run takes no further request
    for idx, (source, destination) in enumerate(zip(source_rows, destination_rows, strict=True)):
        if written.intersection(source):
            raise ArgumentError(
                f"request {idx} reads blocks {list(source)} and writes {list(destination)} after"
                f" blocks {sorted(written)} were written: it would read what has been overwritten."
                " Give the rounds in the order of their planning, or one RoundBatch without"
                " moves_forward"
            )
        was_alone, alone = alone, not moves_forward([source], [destination])
        if idx > start and (alone or was_alone or read_since_start.intersection(destination)):
            groups.append(range(start, idx))
            start = idx
            read_since_start = set()
        read_since_start.update(source)
        written.update(destination)
    return [*groups, range(start, len(source_rows))] if source_rows else []
