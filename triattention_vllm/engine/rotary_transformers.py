"""Rotary parameters of models that vLLM runs through its Transformers backend.

There the decoder holds one ``rotary_emb`` of transformers for all layers, and each attention
module rotates with the ``apply_rotary_pos_emb`` of its own source file, which knows the pairing.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from triattention_vllm.engine.rotary_calls import rotates_its_queries
from triattention_vllm.engine.rotary_types import LayerRotary, check_against_tables
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.method.rope import dims_from_pairs, pairs_from_dims

_FIXED_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_CHECKED_POSITIONS = 1 << 15
_WITHOUT = "serve this model without KV compression"


def read_transformers_layer(
    model: nn.Module, owner: nn.Module, attention: Attention
) -> LayerRotary:
    """Rotary parameters of ``owner``, an attention module of transformers.

    Raises UnsupportedError where the rotary module, its frequencies (those that change with the
    length of a request) or its pairing are not known to be exact.
    """
    rotary = _rotary_module(model, owner)
    if rotary is None or not rotates_its_queries(owner):
        return LayerRotary.none()
    layer_type = _layer_type(rotary, owner)
    prefix = "" if layer_type is None else f"{layer_type}_"
    buffers = dict(rotary.named_buffers(recurse=False))
    inv_freq = buffers[f"{prefix}inv_freq"].detach().to("cpu")
    factor = float(vars(rotary)[f"{prefix}attention_scaling"])
    _check_module(rotary, layer_type, inv_freq)
    arguments = [] if layer_type is None else [layer_type]
    cosines, sines = _tables(rotary, arguments)
    rotary_dim = 2 * inv_freq.numel()
    half = rotary_dim // 2
    name = type(rotary).__name__
    if cosines.shape[-1] not in (half, rotary_dim) or rotary_dim > attention.head_size:
        raise UnsupportedError(
            f"{name} makes cosines of {cosines.shape[-1]} dims for {half} frequencies and heads of "
            f"{attention.head_size}; {_WITHOUT}"
        )
    interleaved = _pairing(owner, cosines, sines, inv_freq, factor)
    doubled = cosines.shape[-1] == rotary_dim
    columns = slice(None, None, 2) if doubled and _repeats(cosines) else slice(0, half)
    table = torch.cat((cosines[:, columns], sines[:, columns]), dim=-1)
    check_against_tables(name, inv_freq, factor, table)
    return LayerRotary(inv_freq.to(torch.float64), factor, rotary_dim, interleaved)


def _rotary_module(model: nn.Module, owner: nn.Module) -> nn.Module | None:
    """The one ``rotary_emb`` from the same source file as ``owner``; None if there is none."""
    source = type(owner).__module__
    found = [
        module
        for name, module in model.named_modules()
        if name.split(".")[-1] == "rotary_emb" and type(module).__module__ == source
    ]
    if len(found) > 1:
        raise UnsupportedError(
            f"{source} has {len(found)} rotary embeddings in one model; which layers use which is "
            f"not known, {_WITHOUT}"
        )
    return found[0] if found else None


def _layer_type(rotary: nn.Module, owner: nn.Module) -> str | None:
    """The entry of ``config.layer_types`` that selects the frequencies, where they depend on it."""
    buffers = dict(rotary.named_buffers(recurse=False))
    if "inv_freq" in buffers:
        return None
    members: Any = owner
    layer_type = str(members.config.layer_types[members.layer_idx])
    if f"{layer_type}_inv_freq" not in buffers:
        raise UnsupportedError(
            f"{type(rotary).__name__} has the buffers {sorted(buffers)}, none of which holds the "
            f"frequencies of {layer_type!r} layers; {_WITHOUT}"
        )
    return layer_type


def _check_module(rotary: nn.Module, layer_type: str | None, inv_freq: Tensor) -> None:
    members: Any = rotary
    rope_type = members.rope_type if layer_type is None else members.rope_type[layer_type]
    if rope_type not in _FIXED_TYPES:
        raise UnsupportedError(
            f"{type(rotary).__name__} has rotary type {rope_type!r}, whose frequencies may change "
            f"with the length of a request; {list(_FIXED_TYPES)} can be read, {_WITHOUT}"
        )
    if inv_freq.dtype != torch.float32:
        raise UnsupportedError(
            f"{type(rotary).__name__} keeps its frequencies as {inv_freq.dtype}, which is too "
            f"coarse for long positions; float32 is needed, {_WITHOUT}"
        )


def _tables(rotary: nn.Module, arguments: list[str]) -> tuple[Tensor, Tensor]:
    """Cosines and sines that the module makes in float32, [P, F or 2F]."""
    device = next(rotary.buffers()).device
    positions = torch.arange(_CHECKED_POSITIONS, device=device)[None]
    with torch.inference_mode():
        sample = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
        cosines, sines = rotary(sample, positions, *arguments)
    return cosines[0].to("cpu").clone(), sines[0].to("cpu").clone()


def _repeats(cosines: Tensor) -> bool:
    """Whether each frequency fills two neighbouring columns, not two columns F apart."""
    return torch.equal(cosines[:, 0::2], cosines[:, 1::2])


def _pairing(
    owner: nn.Module, cosines: Tensor, sines: Tensor, inv_freq: Tensor, factor: float
) -> bool:
    """Rotate probes with the model's own function: True if interleaved, False if half pairing."""
    source = importlib.import_module(type(owner).__module__)
    if "apply_rotary_pos_emb" not in vars(source):
        raise UnsupportedError(
            f"{source.__name__} has no apply_rotary_pos_emb; how {type(owner).__name__} pairs its "
            f"dims is not known, {_WITHOUT}"
        )
    rotate: Callable[..., tuple[Tensor, Tensor]] = vars(source)["apply_rotary_pos_emb"]
    num_positions, rotary_dim = 64, 2 * inv_freq.numel()
    probe = torch.linspace(-1.0, 2.0, num_positions * rotary_dim).sin()
    probe = probe.reshape(1, 1, num_positions, rotary_dim)
    few = slice(0, num_positions)
    rotated, _ = rotate(probe, probe, cosines[None, few], sines[None, few])
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * inv_freq.double()
    turn = torch.polar(torch.full_like(angles, factor), angles)
    matches = []
    for interleaved in (False, True):
        pairs = pairs_from_dims(probe[0, 0].double(), interleaved) * turn
        expected = dims_from_pairs(pairs, interleaved)
        if torch.allclose(rotated[0, 0].double(), expected, atol=1e-4):
            matches.append(interleaved)
    if len(matches) != 1:
        raise UnsupportedError(
            f"apply_rotary_pos_emb of {source.__name__} is neither half nor interleaved pairing; "
            f"{_WITHOUT}"
        )
    return matches[0]
