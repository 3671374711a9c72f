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
    """Runs of consecutive requests, each of which ``moves_forward``; to be executed in order.

    A later request may write what an earlier one reads: blocks that a round released may be
    given out again within one step. It then begins a new run. Raises ArgumentError where no
    order of launches is right: a request that reads what an earlier one writes, or that shifts
    its own blocks.
    """
    groups: list[range] = []
    start = 0
    read_since_start: set[int] = set()
    written: set[int] = set()
    for idx, (source, destination) in enumerate(zip(source_rows, destination_rows, strict=True)):
        if written.intersection(source) or not moves_forward([source], [destination]):
            raise ArgumentError(
                f"request {idx} reads blocks {list(source)} and writes {list(destination)} after"
                f" blocks {sorted(written)} were written: it would read what has been overwritten."
                " Give the rounds in the order of their planning, or one RoundBatch without"
                " moves_forward"
            )
        if read_since_start.intersection(destination):
            groups.append(range(start, idx))
            start = idx
            read_since_start = set()
        read_since_start.update(source)
        written.update(destination)
    return [*groups, range(start, len(source_rows))] if source_rows else []
