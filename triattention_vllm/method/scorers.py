"""Which scorers look at queries, by the name of their method."""

from triattention_vllm.method.observing import ObservingScorer
from triattention_vllm.method.score_h2o import H2OScorer
from triattention_vllm.method.score_rkv import RKVScorer
from triattention_vllm.method.score_snapkv import SnapKVScorer
from triattention_vllm.method.score_tova import TOVAScorer

OBSERVING_SCORERS: dict[str, type[ObservingScorer]] = {
    "snapkv": SnapKVScorer,
    "rkv": RKVScorer,
    "h2o": H2OScorer,
    "tova": TOVAScorer,
}


def num_observed_queries(method: str) -> int:
    """Last queries before a round that the method looks at; 0 for those that look at none."""
    scorer = OBSERVING_SCORERS.get(method)
    return 0 if scorer is None else scorer.num_queries
