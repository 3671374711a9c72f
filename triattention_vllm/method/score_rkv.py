"""R-KV: attention, less for tokens whose keys many others resemble (arXiv 2505.24133).

    s(t) = 0.1 a(t) - 0.9 r(t),    a as in SnapKV
    r    = softmax over t of mean over u of c(u, t),    c(u, t) = cos(k_u, k_t)

with c(u, u) = 0, and c(u, t) = 0 for the latest t among those that u resembles (c > 0.5): of
tokens that are alike, the latest is not called redundant.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from triattention_vllm.method.observing import ObservingScorer
from triattention_vllm.method.score_snapkv import pooled_attention

ATTENTION_WEIGHT = 0.1
ALIKE = 0.5
_CHUNK = 512


class RKVScorer(ObservingScorer):
    """Attention of the last 8 queries and redundancy of keys. Time goes with the square of T."""

    num_queries = 8

    def of_candidates(self, logits: Tensor, keys: Tensor, earlier: Tensor | None) -> Tensor:
        """See ``ObservingScorer.of_candidates``."""
        redundancy = mean_similarity(keys).softmax(-1)
        return ATTENTION_WEIGHT * pooled_attention(logits) - (1 - ATTENTION_WEIGHT) * redundancy


def mean_similarity(keys: Tensor) -> Tensor:
    """Mean over u of ``c(u, t)``, [H_kv, T] for keys [H_kv, T, D]; in chunks of u, which bound the
    scratch memory."""
    directions = normalize(keys, dim=-1)
    num_heads, num_tokens, _ = keys.shape
    places = torch.arange(num_tokens, device=keys.device)
    total = torch.zeros(num_heads, num_tokens, device=keys.device)
    for start in range(0, num_tokens, _CHUNK):
        own = places[start : start + _CHUNK]
        cosines = directions[:, own] @ directions.transpose(1, 2)  # [H_kv, u, T]
        cosines.masked_fill_(own[:, None] == places, 0)
        latest = torch.where(cosines > ALIKE, places, -1).amax(-1, keepdim=True)
        cosines.masked_fill_(latest == places, 0)
        total += cosines.sum(1)
    return total / num_tokens
