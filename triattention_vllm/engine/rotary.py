"""The running model's own rotary parameters, in full precision and checked against its tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    DualChunkRotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Gemma4RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    MRotaryEmbeddingInterleaved,
    NTKScalingRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import (
    Ernie4_5_VLRotaryEmbedding,
)
from vllm.model_executor.models.transformers.base import Base as TransformersBackend

from triattention_vllm.engine.differences import TRANSFORMERS_LAYERS_ARE_IN_THE_TREE
from triattention_vllm.engine.rotary_calls import rotates_its_queries
from triattention_vllm.engine.rotary_transformers import read_transformers_layer
from triattention_vllm.engine.rotary_types import LayerRotary, check_against_tables
from triattention_vllm.errors import SeamError, UnsupportedError
from triattention_vllm.method.rope import Rotary

_MODULES = (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding, DualChunkRotaryEmbedding)


@dataclass(frozen=True)
class _Frequencies:
    """``cos[p, f] = m cos(p w_f)``: inv_freq ``w`` [F], attention_factor ``m``, table [P, 2F]."""

    inv_freq: Tensor
    attention_factor: float
    table: Tensor


def read_rotary(model: nn.Module, layer_names: Sequence[str]) -> Rotary:
    """Rotary parameters of this rank's attention layers, in the order of ``layer_names``.

    Frequencies are computed again from the module's own parameters: its tables have the model's
    dtype, which in bfloat16 is off by half a radian at 32k positions. The result is then compared
    with those tables, so a changed vLLM or a patched module is noticed.

    Raises UnsupportedError for a rotary class that is not known to be exact, or layers that
    disagree in pairing or rotated dims; SeamError where tables and parameters disagree.
    """
    owners = attention_owners(model)
    missing = [name for name in layer_names if name not in owners]
    backed = isinstance(model, TransformersBackend)
    if missing and backed and not TRANSFORMERS_LAYERS_ARE_IN_THE_TREE:
        raise UnsupportedError(
            f"{type(model).__name__} is run by vLLM's Transformers backend, which through 0.29 "
            "does not say which module an attention layer belongs to; use vLLM 0.30 or "
            "newer, or start without --kv-compression"
        )
    if missing:
        raise SeamError(
            f"attention layers {missing} are not in the model's module tree, which has "
            f"{sorted(owners)}; this vLLM version is not supported"
        )
    if backed:
        layers = [read_transformers_layer(model, *owners[name]) for name in layer_names]
    else:
        layers = [_read_layer(model, *owners[name]) for name in layer_names]
    return _stacked(layer_names, layers)


def attention_owners(model: nn.Module) -> dict[str, tuple[nn.Module, Attention]]:
    """Layer name -> (the module that projects its queries, the attention layer in it)."""
    return {
        child.layer_name: (module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, Attention)
    }


def _stacked(layer_names: Sequence[str], layers: Sequence[LayerRotary]) -> Rotary:
    rotated = [layer for layer in layers if layer.rotary_dim > 0]
    for what, values in (
        ("rotate different numbers of dims", {layer.rotary_dim for layer in rotated}),
        ("pair their dims differently (interleaved)", {layer.interleaved for layer in rotated}),
    ):
        if len(values) > 1:
            raise UnsupportedError(
                f"attention layers {list(layer_names)} {what}: {sorted(values)}; KV compression "
                "needs one layout for all of them, serve this model without it"
            )
    num_frequencies = rotated[0].rotary_dim // 2 if rotated else 0
    inv_freq = torch.zeros(len(layers), num_frequencies, dtype=torch.float64)
    for row, layer in zip(inv_freq, layers, strict=True):
        if layer.rotary_dim:
            row.copy_(layer.inv_freq)
    return Rotary(
        inv_freq=inv_freq,
        attention_factor=torch.tensor(
            [layer.attention_factor for layer in layers], dtype=torch.float64
        ),
        rotary_dims=tuple(layer.rotary_dim for layer in layers),
        interleaved=rotated[0].interleaved if rotated else False,
    )


def _read_layer(model: nn.Module, owner: nn.Module, attention: Attention) -> LayerRotary:
    modules = [child for child in owner.children() if isinstance(child, _MODULES)]
    owner_name = type(owner).__name__
    if len(modules) > 1:
        raise UnsupportedError(
            f"{owner_name} holds {len(modules)} rotary embeddings; KV compression reads one per "
            "attention layer, serve this model without it"
        )
    if not modules:
        _check_rotary_is_nowhere_else(model, owner)
        return LayerRotary.none()
    if not rotates_its_queries(owner):
        return LayerRotary.none()
    return _read_module(modules[0], attention)


def _check_rotary_is_nowhere_else(model: nn.Module, owner: nn.Module) -> None:
    """A layer without a rotary module is a NoPE layer, unless something outside rotates for it."""
    held = {id(child) for pair in attention_owners(model).values() for child in pair[0].children()}
    for name, module in model.named_modules():
        if isinstance(module, _MODULES) and id(module) not in held:
            raise UnsupportedError(
                f"{type(owner).__name__} holds no rotary embedding but the model has one at "
                f"{name!r}; which layers it rotates is not known, serve this model without KV "
                "compression"
            )


def _read_module(module: RotaryEmbeddingBase, attention: Attention) -> LayerRotary:
    reader = _READERS.get(type(module))
    if reader is None:
        known = sorted(cls.__name__ for cls in _READERS)
        raise UnsupportedError(
            f"the model rotates with {type(module).__name__}, whose frequencies KV compression "
            f"cannot read; it reads {known}. Serve this model without KV compression"
        )
    if module.head_size != attention.head_size:
        raise UnsupportedError(
            f"{type(module).__name__} rotates heads of {module.head_size} dims in an attention "
            f"layer with heads of {attention.head_size}; serve this model without KV compression"
        )
    with torch.device("cpu"), torch.no_grad():
        frequencies = reader(module)
    name = type(module).__name__
    check_against_tables(
        name, frequencies.inv_freq, frequencies.attention_factor, frequencies.table
    )
    interleaved = type(module) is not Phi3LongRoPEScaledRotaryEmbedding and not bool(
        module.is_neox_style
    )
    return LayerRotary(
        inv_freq=frequencies.inv_freq.to(torch.float64),
        attention_factor=frequencies.attention_factor,
        rotary_dim=int(module.rotary_dim),
        interleaved=interleaved,
    )


def _plain(module: RotaryEmbeddingBase) -> _Frequencies:
    return _Frequencies(module._compute_inv_freq(module.base), 1.0, module.cos_sin_cache)


def _linear(module: LinearScalingRotaryEmbedding) -> _Frequencies:
    """``w_f / s``: positions are divided by the one scaling factor."""
    if len(module.scaling_factors) != 1:
        raise UnsupportedError(
            f"linear rotary scaling with the factors {module.scaling_factors}; KV compression "
            "reads one factor"
        )
    inv_freq = module._compute_inv_freq(module.base).to(torch.float64)
    return _Frequencies(inv_freq / module.scaling_factors[0], 1.0, module.cos_sin_cache)


def _dynamic_ntk(module: DynamicNTKScalingRotaryEmbedding) -> _Frequencies:
    """base' = base (s L / L_trained - (s - 1))^(d / (d - 2)), fixed by vLLM for all lengths."""
    factor = module.scaling_factor
    stretch = factor * module.max_position_embeddings / module.max_trained_positions
    exponent = module.rotary_dim / (module.rotary_dim - 2)
    base = module.base * (stretch - (factor - 1)) ** exponent
    return _Frequencies(module._compute_inv_freq(base), 1.0, module.cos_sin_cache)


def _dynamic_ntk_alpha(module: DynamicNTKAlphaRotaryEmbedding) -> _Frequencies:
    """base' = base alpha^(d / (d - 2))."""
    base = module.base * module.scaling_alpha ** (module.rotary_dim / (module.rotary_dim - 2))
    return _Frequencies(module._compute_inv_freq(base), 1.0, module.cos_sin_cache)


def _yarn(module: YaRNScalingRotaryEmbedding) -> _Frequencies:
    inv_freq = module._compute_inv_freq(module.scaling_factor)
    return _Frequencies(inv_freq, float(module.mscale), module.cos_sin_cache)


def _mrope(module: MRotaryEmbedding) -> _Frequencies:
    """Text tokens have the same position on all axes, so the sections do not matter; prompts with
    others are refused (``requests.check_media``)."""
    if module.scaling_factor is None:
        return _plain(module)
    inv_freq = module._compute_inv_freq(module.scaling_factor)
    return _Frequencies(inv_freq, float(module.mscale), module.cos_sin_cache)


def _long_rope(module: Phi3LongRoPEScaledRotaryEmbedding) -> _Frequencies:
    """vLLM fixes long or short factors at start-up; the long table lies behind the short one."""
    num_short = module.original_max_position_embeddings
    if module.use_long_rope:
        factors, scale = module.long_factor, module.long_mscale
        table = module.long_short_cos_sin_cache[num_short:]
    else:
        factors, scale = module.short_factor, module.short_mscale
        table = module.long_short_cos_sin_cache[:num_short]
    return _Frequencies(module._compute_inv_freq(factors), float(scale), table)


_READERS: dict[type[nn.Module], Callable[..., _Frequencies]] = {
    RotaryEmbedding: _plain,
    Llama3RotaryEmbedding: _plain,
    NTKScalingRotaryEmbedding: _plain,
    Gemma4RotaryEmbedding: _plain,
    LinearScalingRotaryEmbedding: _linear,
    DynamicNTKScalingRotaryEmbedding: _dynamic_ntk,
    DynamicNTKAlphaRotaryEmbedding: _dynamic_ntk_alpha,
    YaRNScalingRotaryEmbedding: _yarn,
    MRotaryEmbedding: _mrope,
    MRotaryEmbeddingInterleaved: _mrope,
    Ernie4_5_VLRotaryEmbedding: _mrope,
    Phi3LongRoPEScaledRotaryEmbedding: _long_rope,
}
"""Exact classes: a subclass may rotate otherwise, so it must be read and added here first."""
