"""SnapKV: what the last queries attend to, smoothed over neighbours (arXiv 2404.14469).

a(t) = mean over queries of softmax over t of (max over the group's query heads of the logits)
s(t) = max over the 7 tokens around t of a
"""

from torch import Tensor
from torch.nn.functional import max_pool1d

from triattention_vllm.method.observing import ObservingScorer

POOL = 7


class SnapKVScorer(ObservingScorer):
    """Attention of the last 8 queries. Neighbours are those in the cache, survivors in order."""

    num_queries = 8

    def of_candidates(self, logits: Tensor, keys: Tensor, earlier: Tensor | None) -> Tensor:
        """See ``ObservingScorer.of_candidates``."""
        return pooled_attention(logits)


def pooled_attention(logits: Tensor) -> Tensor:
    """``s`` [H_kv, T] of logits [H_kv, G, n, T]."""
    attention = logits.amax(1).softmax(-1).mean(1)
    return max_pool1d(attention, POOL, stride=1, padding=POOL // 2)
