"""Key norm: small keys draw attention and stay (arXiv 2406.11430).

s(token) = -|k|
"""

from collections.abc import Sequence

from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.method.region import region_norms
from triattention_vllm.method.scorer import Observation, Scorer


class KnormScorer(Scorer):
    """The negative length of the cached key. RoPE turns keys and leaves their length."""

    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """See ``Scorer.scores``; one score per KV head, float32. Reads K of the regions once."""
        return -region_norms(kv, batch, "keys")
