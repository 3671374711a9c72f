"""How much of what a token's value says is said again by later ones.

    r(t) = log(1 + sum over u > t of max(0, cos(v_t, v_u))^8)

over the candidates of one KV head. Values carry no position, so two tokens that say the same are
alike wherever they stand; what they say twice is worth keeping once, and the latest is the one.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK = 512
_SHARPNESS = 3
"""Squarings: a cosine of 0.9 counts 0.43, one of 0.5 counts 0.004."""


def value_redundancy(values: Tensor) -> Tensor:
    """``r`` [H_kv, T] for values [H_kv, T, D] float32, in order. Time goes with the square of T;
    scratch memory is bounded by chunks of t."""
    directions = normalize(values, dim=-1)
    num_tokens = values.shape[1]
    found = []
    for start in range(0, num_tokens, _CHUNK):
        own, later = directions[:, start : start + _CHUNK], directions[:, start:]
        alike = (own @ later.transpose(1, 2)).clamp(min=0)  # [H_kv, t, u]
        for _ in range(_SHARPNESS):
            alike = alike.square()
        found.append(alike.triu(1).sum(-1))
    return torch.cat(found, dim=1).log1p()
