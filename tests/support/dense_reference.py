"""A decoder in float64 whose every query sees an explicit set of earlier tokens.

Positions never move: a token keeps the RoPE position it was computed at. What a query may see is a
set of token positions per layer and KV head; keys and values of a token are those computed at its
own step, from what that token could see then.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from dense_models import DenseModel, load_dense_model
from torch import Tensor

Stored = Callable[[Tensor], Tensor]
"""What a cache of few bits keeps of keys after RoPE, or of values."""


def exactly(content: Tensor) -> Tensor:
    """A cache that keeps everything."""
    return content


def truncated(content: Tensor, mantissa_bits: int, least_exponent: int, largest: float) -> Tensor:
    """Numbers of a small float format, those between two of them cut towards zero."""
    exponent = content.abs().clamp(min=2.0**least_exponent).log2().floor()
    step = torch.exp2(exponent - mantissa_bits)
    return ((content / step).trunc() * step).clamp(-largest, largest)


def fp8_e4m3(content: Tensor) -> Tensor:
    """As vLLM's CPU build stores fp8 (csrc/cpu/cpu_attn_fp8.hpp)."""
    return truncated(content, 3, -6, 448.0)


def fp8_e5m2(content: Tensor) -> Tensor:
    """Likewise."""
    return truncated(content, 2, -14, 57344.0)


class DenseRun:
    """One sequence: tokens so far, their keys and values, and which of them are still visible.

    keys, values: float64 [L, H_kv, n, D], keys after RoPE. visible: bool [L, H_kv, n].
    """

    def __init__(self, model: DenseModel, stored: Stored = exactly) -> None:
        self.model = model
        self.stored = stored
        empty = torch.empty(
            model.num_layers, model.num_kv_heads, 0, model.head_dim, dtype=torch.float64
        )
        self.keys = empty
        self.values = empty
        self.visible = torch.ones(model.num_layers, model.num_kv_heads, 0, dtype=torch.bool)

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    def extend(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compute ``tokens`` int64 [n]; every one sees the visible earlier tokens, and itself and
        its predecessors among ``tokens``. Returns next-token log-probabilities [n, vocab].

        seen: bool [L, H_kv, n, all tokens] replaces that rule (causality is still applied).
        """
        model = self.model
        num_old, num_new = self.num_tokens, len(tokens)
        positions = torch.arange(num_old, num_old + num_new)
        causal = torch.arange(num_old + num_new) <= positions.unsqueeze(1)  # [n, all]
        self.visible = torch.cat(
            [self.visible, torch.ones(*self.visible.shape[:2], num_new, dtype=torch.bool)], 2
        )
        x = model.embed(tokens)
        keys, values = [], []
        for layer_idx in range(model.num_layers):
            query, key, value = model.project(layer_idx, x)
            query = model.rotary.rotate(query, positions)
            key = self.stored(model.rotary.rotate(key, positions))
            key = torch.cat([self.keys[layer_idx], key], 1)
            value = torch.cat([self.values[layer_idx], self.stored(value)], 1)
            mask = self.visible[layer_idx].unsqueeze(1) if seen is None else seen[layer_idx]
            attended = attend(query, key, value, mask & causal)
            x = model.finish_layer(layer_idx, x, attended)
            keys.append(key)
            values.append(value)
        self.keys, self.values = torch.stack(keys), torch.stack(values)
        return model.logits(x).log_softmax(-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """``softmax(q k / sqrt(D)) v`` over the keys that ``mask`` [H_kv, n, m] allows.

    query [H, n, D]; key, value [H_kv, m, D]; returns [n, H*D].
    """
    group = query.shape[0] // key.shape[0]
    query = query.unflatten(0, (-1, group))  # [H_kv, G, n, D]
    logits = torch.einsum("hgnd,hmd->hgnm", query, key) / key.shape[-1] ** 0.5
    weights = logits.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
    attended = torch.einsum("hgnm,hmd->hgnd", weights, value)
    return attended.flatten(0, 1).transpose(0, 1).flatten(1)


class DenseReference:
    """The model of a folder; ``rounded_to`` rounds its weights first, as an engine of that type;
    ``stored`` is what its cache keeps of keys and values, which every query reads there."""

    def __init__(
        self,
        folder: str | Path,
        rounded_to: torch.dtype | None = None,
        stored: Stored = exactly,
    ) -> None:
        self.model = load_dense_model(Path(folder), rounded_to)
        self.stored = stored

    def start(self) -> DenseRun:
        return DenseRun(self.model, self.stored)

    def logprobs(self, tokens: Tensor | list[int], seen: Tensor | None = None) -> Tensor:
        """Next-token log-probabilities float64 [n, vocab] of a whole sequence at once; ``seen``
        bool [L, H_kv, n, n] says which token each query sees, everything earlier where None."""
        return self.start().extend(torch.as_tensor(tokens), seen)
