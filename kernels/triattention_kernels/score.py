"""Score the cached keys of a batch of rounds."""

from torch import Tensor

from triattention_kernels import score_torch
from triattention_kernels.checks import check_score
from triattention_kernels.implementation import Implementation, choose
from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch


def score(
    kv: PagedKV,
    batch: RoundBatch,
    centres: Tensor,
    norm_weights: Tensor,
    turns: Tensor,
    interleaved: bool,
    rotary_dim: int,
    implementation: Implementation | None = None,
) -> Tensor:
    """``s = sum_f Re[qbar_f c_f conj(k'_f)] + sum_f e_f |k'_f| + sum_d E[q_d] k_d`` for every query
    head and every token of the regions; f runs over the pairs of dims that RoPE rotates, d over the
    other dims.

    k' is the key as cached, after RoPE. Frequency f rotates the pair of dims (f, f + F) or,
    interleaved, (2f, 2f + 1) of the first ``rotary_dim`` dims, with F = rotary_dim / 2. Keys are
    cast to the dtype of the arithmetic first. Scales of tokens and heads are positive, and s is
    homogeneous in k': they multiply the sums.

    centres: [L, H, D] float32 or float64 (decides the dtype of all arithmetic), in head-dim order:
        qbar in the rotated dims, E[q] in the others.
    norm_weights: [L, H, F], e.
    turns: [R, L, F] complex64 or complex128, c: what turns the centres to each request's next
        query position. 1 in a layer that rotates nothing.
    implementation: None for the device's own (``implementation.choose``); Triton computes in
        float32 only.
    Returns [R, L, H, T_max] in the dtype of centres, T_max = S_max * block_size; -inf past a
    request's region. Does not synchronise with the device. Reads K of the regions once.
    Raises ArgumentError.
    Source: arXiv 2604.04921, equations of the score, with the mean over offsets folded into c.
    """
    check_score(kv, batch, centres, norm_weights, turns, rotary_dim)
    weights = (centres, norm_weights, turns)
    if choose(implementation, kv.keys.device) == "triton":
        from triattention_kernels import score_triton

        return score_triton.score(kv, batch, *weights, interleaved, rotary_dim)
    return score_torch.score(kv, batch, *weights, interleaved, rotary_dim)
