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
