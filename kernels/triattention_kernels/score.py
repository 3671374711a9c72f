"""Score the cached keys of a batch of rounds."""

from torch import Tensor

from triattention_kernels import score_torch
from triattention_kernels.checks import check_score
from triattention_kernels.implementation import Implementation, choose
from triattention_kernels.paged import PagedKV, RoundBatch


def score(
    kv: PagedKV,
    batch: RoundBatch,
    query_weights: Tensor,
    norm_weights: Tensor,
    interleaved: bool,
    rotary_dim: int,
    implementation: Implementation | None = None,
) -> Tensor:
    """``s = w . k' + sum_f e_f |k'_f|`` for every query head and every token of the regions.

    k' is the key as cached, after RoPE. ``|k'_f|`` is the length of the pair of dims that
    frequency f rotates, inside the first ``rotary_dim`` dims: (f, f + F) or, interleaved,
    (2f, 2f + 1), with F = rotary_dim / 2. Keys are cast to the dtype of the arithmetic first.
    Scales of tokens and heads are positive, and s is homogeneous in k': they multiply the sums.

    query_weights: [R, L, H, D] float32 or float64 (decides the dtype of all arithmetic), w
        folded for each request's next query position, in head-dim order.
    norm_weights: [L, H, F], e.
    implementation: None for the device's own (``implementation.choose``); Triton computes in
        float32 only.
    Returns [R, L, H, T_max] in the dtype of query_weights, T_max = S_max * block_size; -inf
    past a request's region. Does not synchronise with the device. Reads K of the regions once.
    Raises ArgumentError.
    Source: arXiv 2604.04921, equations of the score, with the mean over offsets folded into w.
    """
    check_score(kv, batch, query_weights, norm_weights, rotary_dim)
    if choose(implementation, kv.keys.device) == "triton":
        from triattention_kernels import score_triton

        return score_triton.score(kv, batch, query_weights, norm_weights, interleaved, rotary_dim)
    return score_torch.score(kv, batch, query_weights, norm_weights, interleaved, rotary_dim)
