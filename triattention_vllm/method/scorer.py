"""What a method is to a round: scores of the cached tokens of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch


@dataclass(frozen=True)
class Observation:
    """What a scorer that looks at queries is told of one request.

    queries: [L, n, H, D] after RoPE at their own positions, ascending; 1 <= n <= ``num_queries``.
        Every candidate is earlier than every one of them.
    earlier: [L, H_kv, T'], the scores of the region's first T' tokens in the round before, or
        None in a first round and for scorers that do not accumulate.
    """

    queries: Tensor
    earlier: Tensor | None = None


class Scorer(ABC):
    """Scores tokens for eviction; schedule, selection and movement are shared by all methods.

    A scorer must depend on nothing but its arguments, so that ranks and reruns keep the same.

    num_queries: last queries before ``N*`` that it has to see; 0 for one that needs none.
    accumulates: whether it goes on from what survivors scored in the round before.
    """

    num_queries: ClassVar[int] = 0
    accumulates: ClassVar[bool] = False

    def num_scores(self, num_kv_heads: int) -> int:
        """Of a token in a layer: one per KV head, unless query heads have their own."""
        return num_kv_heads

    @abstractmethod
    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """Scores [R, L, H, S_max * block_size], the higher the better to keep.

        boundaries: ``N*`` of each request. observed: of each request, or empty where
        ``num_queries`` is 0. H is a multiple of the KV heads: one score per query head, or per
        KV head where a method knows no query heads. Past a request's region the scores may be
        anything. Modifies nothing; does not synchronise with the device.
        """
