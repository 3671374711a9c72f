"""What scorers that look at queries share: their attention over the candidates of a region.

    logits[h, g, q, t] = query[q, h, g] . key[t, h] * scale

for KV head h, query head g of its group, observed query q and candidate t. Torch operations on
the cache's device, one request and layer at a time: slower than the kernels of ``triattention``.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.errors import RoundError
from triattention_vllm.method.region import region_tokens
from triattention_vllm.method.scorer import Observation, Scorer


class ObservingScorer(Scorer):
    """Scores candidates by the attention of a request's last queries.

    scales: of each layer's attention logits, 1 / sqrt(D) in most models. Softmax is taken over
    the candidates: the protected prefix and the window, which stay anyway, have no part in it.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        self._scales = tuple(scales)

    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """See ``Scorer.scores``; one score per KV head, float32, -inf for other tokens than
        candidates. Reads K of the regions once. Raises RoundError where a request was not
        observed."""
        if len(observed) != len(boundaries):
            raise RoundError(
                f"{len(boundaries)} requests and queries of {len(observed)}; a scorer that looks "
                "at queries needs those of every request"
            )
        num_tokens = batch.source_blocks.shape[1] * kv.block_size
        shape = (len(boundaries), kv.num_layers, kv.num_kv_heads, num_tokens)
        found = torch.full(shape, -torch.inf, device=kv.keys.device)
        for request_idx, own in enumerate(observed):
            num_blocks = batch.num_source_blocks[request_idx]
            region = batch.source_blocks[request_idx, :num_blocks]
            candidates = slice(batch.first_candidate[request_idx], num_blocks * kv.block_size)
            for layers, part in kv.evenly_spaced(at_most=1):
                layer = layers.start
                keys = region_tokens(part, region, "keys")[:, candidates]
                queries = torch.unflatten(own.queries[layer].float(), 1, (kv.num_kv_heads, -1))
                logits = torch.einsum("qhgd,htd->hgqt", queries, keys) * self._scales[layer]
                earlier = None
                if own.earlier is not None:
                    earlier = own.earlier[layer, :, candidates]
                found[request_idx, layer, :, candidates] = self.of_candidates(logits, keys, earlier)
        return found

    @abstractmethod
    def of_candidates(self, logits: Tensor, keys: Tensor, earlier: Tensor | None) -> Tensor:
        """Scores [H_kv, T] of one request's candidates in one layer.

        logits: [H_kv, G, n, T] float32. keys: [H_kv, T, D] float32, after RoPE. earlier:
        [H_kv, T'] of the first T' candidates, see ``Observation``.
        """
