"""The specification of ``select``, and its path where there is no GPU."""

import torch
from torch import Tensor

from triattention_kernels.redundancy import Repeats, redundancy
from triattention_kernels.round_batch import RoundBatch

MIN_STD = 1e-6


def select(
    scores: Tensor,
    batch: RoundBatch,
    block_size: int,
    num_kv_heads: int,
    mode: str,
    repeats: Repeats | None,
) -> Tensor:
    """See ``triattention_kernels.select.select``."""
    num_requests, num_layers, _, _ = scores.shape
    penalty = None if repeats is None else redundancy(repeats, batch)
    num_kept_max = batch.destination_blocks.shape[1] * block_size
    shape = (num_layers, num_kv_heads)
    sets = {"per_head": (1, num_kv_heads), "union": (1, 1)}.get(mode, shape)
    kept = torch.zeros((num_requests, *sets, num_kept_max), dtype=torch.int64, device=scores.device)
    for request_idx, first in enumerate(batch.first_candidate):
        end = batch.num_source_blocks[request_idx] * block_size
        num_kept = batch.num_destination_blocks[request_idx] * block_size
        own = None if penalty is None else penalty[request_idx, ..., first:end]
        ranking = rank(scores[request_idx, ..., first:end], num_kv_heads, mode, own)
        kept[request_idx, ..., :first] = torch.arange(first, device=scores.device)
        kept[request_idx, ..., first:num_kept] = first + best(ranking, num_kept - first)
    return kept.expand(-1, *shape, -1)


def rank(scores: Tensor, num_kv_heads: int, mode: str, penalty: Tensor | None = None) -> Tensor:
    """Ranking values of candidates from scores [L, H, T] and penalties [L, H_kv, T]: [H_kv, T] for
    ``per_head``, [L, H_kv, T] for ``per_layer_per_head``, [T] for ``union``; NaN where a score is
    not finite.
    """
    ranking = of_groups(scores, num_kv_heads)
    if penalty is not None:
        ranking = ranking - penalty
    if mode == "per_head":
        return ranking.mean(dim=0)
    if mode == "union":
        return ranking.amax(dim=(0, 1))
    return ranking


def of_groups(scores: Tensor, num_kv_heads: int, normalise: bool = True) -> Tensor:
    """Candidates' scores [L, H, T] as [L, H_kv, T], of each group's best query head; NaN where a
    score is not finite. normalise: each query head to mean 0 and standard deviation 1."""
    scores = torch.where(scores.isfinite(), scores, torch.nan)
    if normalise:
        scores = scores - scores.nanmean(dim=-1, keepdim=True)
        std = scores.square().nanmean(dim=-1, keepdim=True).sqrt().clamp(min=MIN_STD)
        scores = scores / std
    return torch.unflatten(scores, 1, (num_kv_heads, -1)).amax(dim=2)


def best(ranking: Tensor, num_survivors: int) -> Tensor:
    """Ascending indices [..., K] of the K highest values of [..., T]; of equal ones the later,
    NaN below everything.
    """
    latest_first = ranking.nan_to_num(nan=float("-inf")).flip(-1)
    order = latest_first.argsort(dim=-1, descending=True, stable=True)
    return (ranking.shape[-1] - 1 - order[..., :num_survivors]).sort(dim=-1).values
