"""StreamingLLM: attention sinks and the most recent tokens (arXiv 2309.17453).

    s(token) = its place in the region

The sinks are the policy's protected prefix. Places are ages only while survivors stay in order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.method.scorer import Observation, Scorer


class StreamingLLMScorer(Scorer):
    """Recency alone."""

    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """See ``Scorer.scores``; one score per KV head, float32 (exact below 2^24 tokens)."""
        num_requests, num_blocks = batch.source_blocks.shape
        num_tokens = num_blocks * kv.block_size
        places = torch.arange(num_tokens, dtype=torch.float32, device=kv.keys.device)
        # Written out: the kernels read scores as one contiguous tensor.
        shape = (num_requests, kv.num_layers, kv.num_kv_heads, num_tokens)
        return places.expand(shape).contiguous()
