"""A decoder in float64 whose every query sees an explicit set of earlier tokens.

Positions never move: a token keeps the RoPE position it was computed at. What a query may see is a
set of token positions per layer and KV head; keys and values of a token are those computed at its
own step, from what that token could see then.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from dense_hybrids import HYBRIDS
from dense_models import FAMILIES, DenseModel, Json
from safetensors.torch import load_file
from torch import Tensor, nn

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

    keys, values: float64 [L, H_kv, n, D], keys after RoPE; queries: [L, H, n, D] likewise.
    visible: bool [L, H_kv, n]. L counts the model's attention layers; ``states`` are those of
    the others.
    """

    def __init__(self, model: DenseModel, stored: Stored = exactly) -> None:
        self.model = model
        self.stored = stored
        num_layers = len(model.attention_layers)
        empty = torch.empty(num_layers, model.num_kv_heads, 0, model.head_dim, dtype=torch.float64)
        self.keys = empty
        self.values = empty
        self.queries = empty[:, :1].repeat(1, model.num_heads, 1, 1)
        self.visible = torch.ones(num_layers, model.num_kv_heads, 0, dtype=torch.bool)
        self.states: dict[int, tuple[Tensor, ...]] = {}

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def compressed_rows(self) -> list[int]:
        """Rows of ``keys`` whose layers see all tokens: only these are compressed."""
        layers = enumerate(self.model.attention_layers)
        return [row for row, layer_idx in layers if self.model.window_of(layer_idx) is None]

    def extend(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compute ``tokens`` int64 [n]; every one sees the visible earlier tokens, and itself and
        its predecessors among ``tokens``. Returns next-token log-probabilities [n, vocab].

        seen: bool [L, H_kv, n, all tokens] replaces that rule (causality is still applied).
        """
        model = self.model
        num_new = len(tokens)
        self.visible = torch.cat(
            [self.visible, torch.ones(*self.visible.shape[:2], num_new, dtype=torch.bool)], 2
        )
        x = model.embed(tokens)
        rows = {layer_idx: row for row, layer_idx in enumerate(model.attention_layers)}
        keys, values, queries = [], [], []
        states = dict(self.states)
        for layer_idx in range(model.num_layers):
            if layer_idx in rows:
                own = None if seen is None else seen[rows[layer_idx]]
                x, key, value, query = self._attention_layer(layer_idx, rows[layer_idx], x, own)
                keys.append(key)
                values.append(value)
                queries.append(query)
            else:
                mixed, states[layer_idx] = model.mix(layer_idx, x, states.get(layer_idx))
                x = model.finish_layer(layer_idx, x, mixed)
        self.keys, self.values = torch.stack(keys), torch.stack(values)
        self.queries = torch.cat([self.queries, torch.stack(queries)], 2)
        self.states = states
        return model.logits(x).log_softmax(-1)

    def _attention_layer(
        self, layer_idx: int, row: int, x: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(residual stream behind the layer, all its keys, all its values, the new queries)."""
        model, rotary = self.model, self.model.rotary_of(layer_idx)
        positions = torch.arange(self.num_tokens, self.num_tokens + len(x))
        query, key, value = model.project(layer_idx, x)
        query = rotary.rotate(query, positions)
        key = torch.cat([self.keys[row], self.stored(rotary.rotate(key, positions))], 1)
        value = torch.cat([self.values[row], self.stored(value)], 1)
        behind = positions.unsqueeze(1) - torch.arange(key.shape[1])  # [n, all]
        allowed = behind >= 0
        window = model.window_of(layer_idx)
        if window is not None:
            allowed &= behind < window
        mask = self.visible[row].unsqueeze(1) if seen is None else seen
        sinks = model.sinks_of(layer_idx)
        attended = attend(query, key, value, mask & allowed, model.scale, sinks)
        attended = model.gate(layer_idx, x, attended)
        return model.finish_layer(layer_idx, x, attended), key, value, query


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(q k scale) v`` over the keys that ``mask`` [H_kv, n, m] allows; ``sinks`` [H] are
    further logits without a value.

    query [H, n, D]; key, value [H_kv, m, D]; returns [n, H*D].
    """
    group = query.shape[0] // key.shape[0]
    query = query.unflatten(0, (-1, group))  # [H_kv, G, n, D]
    logits = torch.einsum("hgnd,hmd->hgnm", query, key) * scale
    logits = logits.masked_fill(~mask.unsqueeze(1), -torch.inf)
    if sinks is not None:
        extra = sinks.view(*query.shape[:2], 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    weights = logits.softmax(-1)[..., : key.shape[1]]
    attended = torch.einsum("hgnm,hmd->hgnd", weights, value)
    return attended.flatten(0, 1).transpose(0, 1).flatten(1)


def load_dense_model(folder: Path, rounded_to: torch.dtype | None = None) -> DenseModel:
    """The model of ``folder`` in float64; weights first rounded to ``rounded_to`` where given, as
    an engine does that runs the folder in that type."""
    known = {**FAMILIES, **HYBRIDS}
    config: Json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in known:
        raise ValueError(f"model_type {config['model_type']!r}; known are {sorted(known)}.")
    weights = load_file(folder / "model.safetensors")
    if rounded_to is not None:
        weights = {name: weight.to(rounded_to) for name, weight in weights.items()}
    weights = {name: weight.double() for name, weight in weights.items()}
    return known[config["model_type"]](config, weights)


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


def in_float64(model: nn.Module) -> nn.Module:
    """Transformers' model in float64, its RMS norms (which fall back to float32) torch's own."""
    model = model.double().eval()
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            plus_one = kind in ("Gemma3RMSNorm", "Qwen3NextRMSNorm")
            epsilon = module.eps if plus_one else module.variance_epsilon
            norm = nn.RMSNorm(module.weight.shape, eps=epsilon).double()
            norm.weight = nn.Parameter(1 + module.weight) if plus_one else module.weight
            model.set_submodule(name, norm)
    return model
