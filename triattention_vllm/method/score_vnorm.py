"""Value norm: tokens with large values move the output most and stay.

s(token) = |v|
"""

from collections.abc import Sequence

from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.method.region import region_norms
from triattention_vllm.method.scorer import Observation, Scorer


class VnormScorer(Scorer):
    """The length of the cached value."""

    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """See ``Scorer.scores``; one score per KV head, float32. Reads V of the regions once."""
        return region_norms(kv, batch, "values")
