"""How much of what tokens say is said again by later ones, for a batch of rounds."""

from dataclasses import dataclass

from torch import Tensor

from triattention_kernels import redundancy_torch
from triattention_kernels.checks import check_redundancy
from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch

MOST_LATER = 16_384
"""Work grows with a region's square until here, and in proportion behind it: at 131 thousand tokens
in which everything is compared with everything, one round of Qwen3-8B would hold a device that does
150 TFLOP/s for four seconds."""


@dataclass(frozen=True)
class Repeats:
    """That ``select`` takes ``weight`` times the redundancy of values in ``kv`` off its ranking.

    most_later: so many later candidates are looked at.
    """

    kv: PagedKV
    weight: float
    most_later: int = MOST_LATER


def redundancy(repeats: Repeats, batch: RoundBatch) -> Tensor:
    """``weight`` times ``r(t) = log(1 + sum over u of max(0, cos(v_t, v_u))^8)`` for every
    candidate t, with u over the next ``most_later`` candidates of the same layer and KV head.

    Values carry no position, so two tokens that say the same are alike wherever they stand. A
    cosine knows no length: scales of tokens and heads, which are positive, change nothing. A value
    of zeros, or with a number that is not finite, resembles none.

    Returns [R, L, H_kv, T_max] float32, T_max = S_max * block_size; 0 for other tokens than
    candidates. Torch operations on every device, one request and layer at a time, for rankings that
    are made before ``select``; on a GPU ``select`` has a kernel of its own for it. Does not
    synchronise with the device. Raises ArgumentError.
    """
    check_redundancy(repeats.kv, batch)
    return redundancy_torch.redundancy(repeats.kv, batch, repeats.weight, repeats.most_later)
