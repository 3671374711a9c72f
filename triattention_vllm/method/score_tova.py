"""TOVA: what the last query attends to (arXiv 2401.06104).

s(t) = mean over the group's query heads of softmax over t of the logits
"""

from torch import Tensor

from triattention_vllm.method.observing import ObservingScorer


class TOVAScorer(ObservingScorer):
    """Attention of the last query."""

    num_queries = 1

    def of_candidates(self, logits: Tensor, keys: Tensor, earlier: Tensor | None) -> Tensor:
        """See ``ObservingScorer.of_candidates``."""
        return logits[:, :, -1].softmax(-1).mean(1)
