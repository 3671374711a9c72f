"""Random choice: the line that every method has to be above.

s(token) = uniform in [0, 1), drawn anew per layer, KV head and round
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch

from triattention_vllm.method.scorer import Observation, Scorer

SEED = 20260


class RandomScorer(Scorer):
    """Scores that depend on the nominal boundary, the layer and the KV head, not on the request.

    layers: indices in the whole model. first_kv_head: this rank's first KV head in the whole
    model, so that ranks draw for their own heads what one rank would draw for all.
    """

    def __init__(self, layers: Sequence[int], first_kv_head: int = 0) -> None:
        self._layers = tuple(layers)
        self._first_kv_head = first_kv_head

    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """See ``Scorer.scores``; one score per KV head, float32. Drawn on the host."""
        num_tokens = batch.source_blocks.shape[1] * kv.block_size
        shape = (len(boundaries), kv.num_layers, kv.num_kv_heads, num_tokens)
        drawn = torch.empty(shape, pin_memory=kv.keys.is_cuda)
        generator = torch.Generator()
        for request_idx, boundary in enumerate(boundaries):
            for row, layer in enumerate(self._layers):
                for head in range(kv.num_kv_heads):
                    # Python's hash of whole numbers is the same in every process.
                    key = hash((SEED, boundary, layer, self._first_kv_head + head))
                    generator.manual_seed(key)
                    # In order from the first token, so that longer neighbours change nothing.
                    torch.rand(num_tokens, generator=generator, out=drawn[request_idx, row, head])
        return drawn.to(kv.keys.device, non_blocking=True)
