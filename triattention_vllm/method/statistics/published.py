"""Import of statistics files (.pt) of the public reference implementation."""

import os
import pickle
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics.file import new_provenance
from triattention_vllm.method.statistics.fingerprint import Fingerprint
from triattention_vllm.method.statistics.statistics import Statistics

_HEAD_KEY = re.compile(r"layer([0-9]{2,})_head([0-9]{2,})")
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes zip archives since torch 1.6
# What torch.load(weights_only=True) was seen to raise on damaged files (bytes changed at random).
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
_VALUES = ("q_mean_real", "q_mean_imag", "q_abs_mean")
_INTERLEAVED = {"half": False, "interleaved": True}


def import_published(
    path: str | os.PathLike[str], running: Fingerprint | None = None
) -> Statistics:
    """Read ``{"metadata": ..., "stats": {"layerLL_headHH": {q_mean_real, ...}}}``.

    Each layer that occurs must hold every query head 0 to H - 1, float32 [F] with 2F = head_dim.
    The file carries no frequencies, KV heads or weights: the fingerprint has None there, or, when
    the running model is given, is checked against it and takes these from it.
    Loaded with ``weights_only=True``: nothing in the file is executed.

    Raises StatisticsError, naming the path, for anything that is not such a file.
    """
    name = os.fspath(path)
    try:
        metadata, heads = _contents(path)
        statistics = _statistics(metadata, heads, os.path.basename(name))
    except StatisticsError as error:
        raise StatisticsError(
            f"published statistics file {name}: {error}; run `triattention calibrate --model MODEL "
            "--output FILE` instead"
        ) from error
    if running is None:
        return statistics
    try:
        statistics.check_fits(running)
    except StatisticsError as error:
        raise StatisticsError(f"published statistics file {name}: {error}") from error
    return replace(statistics, fingerprint=running)


def _contents(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, Tensor]]]:
    """Metadata, and the three tensors of each (layer index, query head index)."""
    content = _load(path)
    if not isinstance(content, dict) or set(content) != {"metadata", "stats"}:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise StatisticsError(f"it holds {found}; it must hold 'metadata' and 'stats'")
    metadata, stats = content["metadata"], content["stats"]
    if not isinstance(metadata, dict) or not isinstance(stats, dict) or not stats:
        raise StatisticsError("its 'metadata' and 'stats' must be dictionaries, 'stats' not empty")
    heads = {}
    for key, values in stats.items():
        match = _HEAD_KEY.fullmatch(str(key))
        if match is None:
            raise StatisticsError(f"its key {key!r} is not of the form layerLL_headHH")
        _check_values(key, values)
        heads[int(match[1]), int(match[2])] = values
    if len(heads) != len(stats):
        raise StatisticsError("it names a layer and head twice")
    return metadata, heads


def _load(path: str | os.PathLike[str]) -> object:
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise StatisticsError(f"it cannot be read ({error}); check the path") from error
    if magic != _ZIP_MAGIC:
        raise StatisticsError("it is not a file written by torch.save")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StatisticsError(
            f"it is damaged or holds more than tensors and plain values ({reason})"
        ) from error
    return content


def _check_values(key: str, values: object) -> None:
    if not isinstance(values, dict) or set(values) != set(_VALUES):
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise StatisticsError(f"{key} holds {found}; it must hold {list(_VALUES)}")
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() != 1:
            found = type(value).__name__
            if isinstance(value, Tensor):
                found = f"{value.dtype} {list(value.shape)}"
            raise StatisticsError(f"{name} of {key} is {found}; it must be torch.float32 [F]")


def _statistics(
    metadata: dict[str, Any], heads: dict[tuple[int, int], dict[str, Tensor]], name: str
) -> Statistics:
    layer_indices = sorted({layer_idx for layer_idx, _ in heads})
    num_heads = 1 + max(head_idx for _, head_idx in heads)
    expected = [(layer, head) for layer in layer_indices for head in range(num_heads)]
    missing = [pair for pair in expected if pair not in heads]
    if missing:
        layer_idx, head_idx = missing[0]
        raise StatisticsError(
            f"{len(missing)} of {len(expected)} heads are missing, first layer {layer_idx} head "
            f"{head_idx}; every layer must hold heads 0 to {num_heads - 1}"
        )
    _check_sampled_heads(metadata, expected)
    fingerprint = _fingerprint(metadata, layer_indices, num_heads)
    num_frequencies = fingerprint.num_frequencies
    stacked = {}
    for value in _VALUES:
        wrong = [pair for pair in expected if heads[pair][value].numel() != num_frequencies]
        if wrong:
            raise StatisticsError(
                f"{value} of layer {wrong[0][0]} head {wrong[0][1]} has "
                f"{heads[wrong[0]][value].numel()} frequencies; head_dim {fingerprint.head_dim} "
                f"needs {num_frequencies}. Partly rotated heads cannot be imported, since these "
                f"files have no means of unrotated dims"
            )
        rows = torch.stack([heads[pair][value] for pair in expected])
        stacked[value] = rows.reshape(len(layer_indices), num_heads, num_frequencies)
    return Statistics(
        fingerprint=fingerprint,
        centre_real=stacked["q_mean_real"],
        centre_imag=stacked["q_mean_imag"],
        magnitude=stacked["q_abs_mean"],
        unrotated_mean=torch.zeros(len(layer_indices), num_heads, fingerprint.head_dim),
        provenance=new_provenance(
            "unknown",
            f"imported from {name} (model {metadata.get('model_name', 'unknown')})",
            f"torch {torch.__version__}",
        ),
    )


def _check_sampled_heads(metadata: dict[str, Any], present: list[tuple[int, int]]) -> None:
    """The list of (layer, head) in the metadata, where there is one, names the same heads."""
    if "sampled_heads" not in metadata:
        return
    listed = metadata["sampled_heads"]
    well_formed = isinstance(listed, list) and all(
        isinstance(pair, (list, tuple)) and all(type(item) is int for item in pair)
        for pair in listed
    )
    if not well_formed or sorted(map(tuple, listed)) != present:
        raise StatisticsError(
            f"its metadata lists other heads in 'sampled_heads' than the {len(present)} it holds"
        )


def _fingerprint(metadata: dict[str, Any], layer_indices: list[int], num_heads: int) -> Fingerprint:
    head_dim, rope_style = metadata.get("head_dim"), metadata.get("rope_style")
    if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
        raise StatisticsError(f"its metadata says head_dim {head_dim!r}; it must be an even number")
    if not isinstance(rope_style, str) or rope_style not in _INTERLEAVED:
        raise StatisticsError(
            f"its metadata says rope_style {rope_style!r}; it must be one of {sorted(_INTERLEAVED)}"
        )
    return Fingerprint(
        architecture=None,
        layer_indices=tuple(layer_indices),
        num_heads=num_heads,
        num_kv_heads=None,
        head_dim=head_dim,
        rotary_dims=(head_dim,) * len(layer_indices),
        interleaved=_INTERLEAVED[rope_style],
        inv_freq_hash=None,
        weights_hash=None,
    )
