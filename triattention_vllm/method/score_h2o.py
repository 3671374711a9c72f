"""H2O: attention that a token has drawn so far, the heavy hitters (arXiv 2306.14048).

s(t) = s in the round before (0 for a token that is new)
     + sum over queries and the group's query heads of softmax over t of the logits
"""

from torch import Tensor

from triattention_vllm.method.observing import ObservingScorer


class H2OScorer(ObservingScorer):
    """Attention of the last 32 queries of every round, accumulated along with the survivors."""

    num_queries = 32
    accumulates = True

    def of_candidates(self, logits: Tensor, keys: Tensor, earlier: Tensor | None) -> Tensor:
        """See ``ObservingScorer.of_candidates``."""
        drawn = logits.softmax(-1).sum((1, 2))
        if earlier is not None:
            drawn[:, : earlier.shape[1]] += earlier
        return drawn
