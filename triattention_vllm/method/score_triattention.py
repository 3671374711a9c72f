"""The TriAttention score, folded once per round into two products (arXiv 2604.04921).

    s(k) = mean over d in OFFSETS of sum_f Re[qbar_f conj(k'_f) exp(i w_f (T + d))]
         + sum_f (a_f - |qbar_f|) |k'_f|  +  sum over unrotated d of E[q_d] k_d

with ``k'`` the key as cached, after RoPE. The mean is linear, so it is taken once:

    c_f(T) = exp(i w_f T) * mean_d exp(i w_f d),    e_f = a_f - |qbar_f|
    s(k)   = sum_f Re[qbar_f c_f(T) conj(k'_f)] + sum_f e_f |k'_f| + sum over unrotated d of ...

Of these only ``c_f(T)`` changes from round to round. It is computed on the host, in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from triattention_kernels import PagedKV, RoundBatch, score

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.rope import Rotary, dims_from_pairs, phases
from triattention_vllm.method.scorer import Observation, Scorer
from triattention_vllm.method.statistics import Statistics

OFFSETS = tuple(2**power for power in range(17))


class TriAttentionScorer(Scorer):
    """Weights that the score kernel multiplies with cached keys, for L layers and H query heads.

    statistics: of exactly these layers and heads (a rank's shard); rotary: of the same layers.
    dtype: of the weights, float32 or float64. device: where they are used.
    Cached keys already carry the attention factor ``m``; the rotated weights carry it as well, as
    the query would, so that rotated and unrotated dims keep their relative weight.

    offsets: distances of the next queries. norm_term: False leaves ``e_f`` out.

    centres: ``m qbar_f`` and ``E[q_d]``, [L, H, D] of this dtype in head-dim order.
    norm_weights: ``m e_f``, [L, H, F]. rotary_dim: ``2F``; a NoPE layer has zeros in its norm
        weights, plain means in its centres and turns of 1, so the kernel needs no exception.

    Raises StatisticsError where statistics and rotary describe different layers.
    """

    def __init__(
        self,
        statistics: Statistics,
        rotary: Rotary,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        offsets: Sequence[int] = OFFSETS,
        norm_term: bool = True,
    ) -> None:
        _check_same_layers(statistics, rotary)
        factor = rotary.attention_factor.cpu().reshape(-1, 1, 1)
        centre = statistics.centre().cpu()
        excess = statistics.magnitude.cpu().double() - centre.abs()
        self.interleaved = rotary.interleaved
        self.rotary_dim = 2 * rotary.num_frequencies
        unrotated = statistics.unrotated_mean.cpu().double()
        rotated = dims_from_pairs(factor * centre, self.interleaved)
        centres = unrotated + pad(rotated, (0, unrotated.shape[-1] - self.rotary_dim))
        self.centres = centres.to(device=device, dtype=dtype)
        weight = factor if norm_term else 0 * factor
        self.norm_weights = (weight * excess).to(device=device, dtype=dtype)
        # Layers mostly share their frequencies: each set of them is turned once.
        rows = [tuple(row) for row in rotary.inv_freq.tolist()]
        distinct = list(dict.fromkeys(rows))
        self._inv_freq = rotary.inv_freq.cpu()[[rows.index(row) for row in distinct]]
        self._row_of_layer = [distinct.index(row) for row in rows]
        self._offset_mean = mean_turn(self._inv_freq, offsets)

    def num_scores(self, num_kv_heads: int) -> int:
        """See ``Scorer.num_scores``; every query head scores."""
        return self.centres.shape[1]

    def scores(
        self,
        kv: PagedKV,
        batch: RoundBatch,
        boundaries: Sequence[int],
        observed: Sequence[Observation] = (),
    ) -> Tensor:
        """See ``Scorer.scores``; one score per query head."""
        return score(
            kv,
            batch,
            self.centres,
            self.norm_weights,
            self.turns(boundaries),
            interleaved=self.interleaved,
            rotary_dim=self.rotary_dim,
        )

    def turns(self, boundaries: Sequence[int]) -> Tensor:
        """``c_f(T)`` for each request's next position ``T``, complex [R, L, F] on the device.

        boundaries: nominal boundaries ``N*``, one per request. Computed in float64 and rounded
        once. One copy, which the host does not wait for. Layers may share memory.
        """
        positions = torch.tensor(boundaries, dtype=torch.int64).reshape(-1, 1)
        turns = phases(self._inv_freq, positions) * self._offset_mean
        turns = turns.to(self.centres.dtype.to_complex())
        if len(self._inv_freq) > 1:
            turns = turns[:, self._row_of_layer]
        device = self.centres.device
        if device.type == "cuda":
            turns = turns.pin_memory()  # the host would wait for a copy of other memory
        return turns.to(device, non_blocking=True).expand(-1, len(self.centres), -1)


def offsets_of(setting: str, longest: int) -> tuple[int, ...]:
    """The offsets that ``score_offsets`` names; ``short`` ends at ``longest`` tokens."""
    if setting == "geometric":
        return OFFSETS
    if setting == "short":
        return tuple(offset for offset in OFFSETS if offset <= longest)
    return tuple(map(int, setting.split(",")))


def mean_turn(inv_freq: Tensor, offsets: Sequence[int]) -> Tensor:
    """``mean_d exp(i w_f d)`` as complex128 [..., F] for inv_freq float64 [..., F]."""
    distances = torch.tensor(offsets, dtype=torch.int64).reshape(-1, *[1] * (inv_freq.dim() - 1))
    return phases(inv_freq, distances).mean(0)


def _check_same_layers(statistics: Statistics, rotary: Rotary) -> None:
    model = statistics.fingerprint
    mine = (model.rotary_dims, model.num_frequencies, model.interleaved)
    theirs = (rotary.rotary_dims, rotary.num_frequencies, rotary.interleaved)
    if mine != theirs:
        raise StatisticsError(
            f"statistics have rotary dims, frequencies and interleaving {mine}, the running "
            f"model has {theirs}; pass the shard and the rotary parameters of the same layers"
        )
