"""Other ways from scores to a ranking than the one that ``select`` has built in.

``select`` normalises every query head, takes the best head of a group and the mean over layers.
Here that is done beforehand in one of several ways, with one ranking per KV head as the result:
normalising it once more, and a mean over layers that are all equal, change no order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triattention_kernels import PagedKV, Repeats, RoundBatch, Selection, redundancy
from triattention_kernels.select_torch import MIN_STD, of_groups

from triattention_vllm.method.region import region_norms
from triattention_vllm.score_settings import LayersTogether


@dataclass(frozen=True)
class Ranking:
    """What ``select`` does not do by itself is torch operations on the scores' device, one request
    at a time, and slower.

    normalise: scores of each query head to mean 0 and standard deviation 1 over the candidates.
    layers: how ``per_head`` puts layers together.
    redundancy: percent of ``triattention_kernels.redundancy`` that is taken off a KV head's score.
    protected_values: percent of the survivors that are chosen by the length of their value.
    """

    normalise: bool = True
    layers: LayersTogether = "mean"
    redundancy: int = 0
    protected_values: int = 0

    @property
    def is_built_in(self) -> bool:
        """Whether ``select`` does all of this by itself."""
        return self == Ranking(redundancy=self.redundancy)

    def repeats(self, kv: PagedKV) -> Repeats | None:
        """The redundancy as the kernels take it."""
        return Repeats(kv, self.redundancy / 100) if self.redundancy else None

    def ranked(
        self, scores: Tensor, kv: PagedKV, batch: RoundBatch, selection: Selection
    ) -> Tensor:
        """Scores [R, L, H, T] as [R, L, H_kv, T] for ``select``, -inf for other tokens than
        candidates and for scores that are not finite."""
        num_tokens = scores.shape[-1]
        shape = (batch.num_requests, kv.num_layers, kv.num_kv_heads, num_tokens)
        found = scores.new_full(shape, -torch.inf)
        lengths = region_norms(kv, batch, "values") if self.protected_values else None
        repeats = self.repeats(kv)
        penalty = None if repeats is None else redundancy(repeats, batch)
        for request_idx, first in enumerate(batch.first_candidate):
            end = batch.num_source_blocks[request_idx] * kv.block_size
            candidates = scores[request_idx, ..., first:end]
            own = of_groups(candidates, kv.num_kv_heads, self.normalise)
            if penalty is not None:
                own = own - penalty[request_idx, ..., first:end]
            own = self._together(own, selection)
            if lengths is not None:
                num_kept = batch.num_destination_blocks[request_idx] * kv.block_size - first
                values = shared_lengths(lengths[request_idx, ..., first:end], selection)
                own = _lifted(own, values, num_kept * self.protected_values // 100)
            found[request_idx, ..., first:end] = own
        return found

    def _together(self, scores: Tensor, selection: Selection) -> Tensor:
        """Candidates' scores [L, H_kv, T], with dims of size 1 where they are shared."""
        if selection == "per_head" and self.layers == "mean":
            scores = scores.mean(0, keepdim=True)
        elif selection == "per_head":
            scores = scores.amax(0, keepdim=True)
        elif selection == "union":
            scores = scores.amax((0, 1), keepdim=True)
        return scores.nan_to_num(nan=-torch.inf)


def shared_lengths(lengths: Tensor, selection: Selection) -> Tensor:
    """Lengths [L, H_kv, T] against the mean of their layer and head, the largest of those that
    share a keep set."""
    lengths = lengths / lengths.mean(-1, keepdim=True).clamp(min=MIN_STD)
    if selection == "per_head":
        return lengths.amax(0, keepdim=True)
    return lengths.amax((0, 1), keepdim=True) if selection == "union" else lengths


def _lifted(scores: Tensor, lengths: Tensor, num_lifted: int) -> Tensor:
    """Scores [..., T] with those of the ``num_lifted`` greatest lengths above all others."""
    longest = lengths.argsort(dim=-1, descending=True, stable=True)[..., :num_lifted]
    above = scores.amax(-1, keepdim=True).clamp(min=0) + 1
    return scores.scatter(-1, longest, above.expand(longest.shape))
