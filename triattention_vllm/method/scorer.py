"""What a method is to a round: scores of the cached tokens of a batch."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch


class Scorer(Protocol):
    """Scores tokens for eviction; schedule, selection and movement are shared by all methods.

    A scorer must depend on nothing but its arguments, so that ranks and reruns keep the same.
    """

    def scores(self, kv: PagedKV, batch: RoundBatch, boundaries: Sequence[int]) -> Tensor:
        """Scores [R, L, H, S_max * block_size], the higher the better to keep.

        boundaries: ``N*`` of each request. H is a multiple of the KV heads: one score per query
        head, or per KV head where a method knows no query heads. Past a request's region the
        scores may be anything. Modifies nothing; does not synchronise with the device.
        """
