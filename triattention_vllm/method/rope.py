"""Rotary position embedding as complex pairs: the running model's own parameters, in float64.

A query or key before RoPE is read as complex pairs ``q_f = x_f + i y_f``, where ``(x_f, y_f)`` are
the dims ``(f, f + F)`` (half / NeoX pairing) or ``(2f, 2f + 1)`` (interleaved / GPT-J pairing) of
the first ``rotary_dim = 2 F`` dims. RoPE at position ``p`` gives ``q'_f = m q_f exp(i w_f p)``,
with the attention factor ``m`` (YaRN; 1 elsewhere). The other dims are not rotated.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triattention_vllm.errors import UnsupportedError


def pairs_from_dims(dims: Tensor, interleaved: bool) -> Tensor:
    """Read rotated dims [..., 2F] (float32 or float64) as complex pairs [..., F]."""
    if interleaved:
        first, second = dims[..., 0::2], dims[..., 1::2]
    else:
        first, second = dims.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


def dims_from_pairs(pairs: Tensor, interleaved: bool) -> Tensor:
    """Lay complex pairs [..., F] out in head-dim order [..., 2F]; inverse of pairs_from_dims."""
    if interleaved:
        return torch.view_as_real(pairs).flatten(-2)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def phases(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """``exp(i w_f p)`` as complex128 [..., F] for positions [...] and inv_freq float64 [F].

    The angle is a float64 product: at a million positions it is wrong by less than 1e-9 radian.
    """
    angles = positions.to(torch.float64).unsqueeze(-1) * inv_freq
    return torch.polar(torch.ones_like(angles), angles)


@dataclass(frozen=True)
class Rotary:
    """Rotary parameters of L attention layers, as the running model uses them.

    inv_freq: ``w``, float64 [L, F], radians per position; rows of NoPE layers are zeros.
    attention_factor: ``m``, float64 [L]; multiplies cos and sin.
    rotary_dims: rotated leading dims per layer: 2F, or 0 for a NoPE layer.
    interleaved: GPT-J pairing; otherwise half (NeoX) pairing.

    Raises UnsupportedError where the parts do not describe one such model.
    """

    inv_freq: Tensor
    attention_factor: Tensor
    rotary_dims: tuple[int, ...]
    interleaved: bool

    def __post_init__(self) -> None:
        num_layers = len(self.rotary_dims)
        if self.inv_freq.dim() != 2 or self.inv_freq.shape[0] != num_layers:
            raise UnsupportedError(
                f"inv_freq has shape {list(self.inv_freq.shape)} for {num_layers} layers; it must "
                f"be [{num_layers}, F]: pass one row of frequencies per layer"
            )
        if list(self.attention_factor.shape) != [num_layers]:
            raise UnsupportedError(
                f"attention_factor has shape {list(self.attention_factor.shape)}; it must be "
                f"[{num_layers}]: pass one factor per layer (1.0 without YaRN)"
            )
        for name in ("inv_freq", "attention_factor"):
            _check_float64(name, self.inv_freq if name == "inv_freq" else self.attention_factor)
        if not bool((self.attention_factor > 0).all()):
            raise UnsupportedError(
                f"attention factors are {self.attention_factor.tolist()}; each must be positive"
            )
        self._check_rotary_dims()

    def _check_rotary_dims(self) -> None:
        allowed = (0, 2 * self.num_frequencies)
        wrong = {idx: dim for idx, dim in enumerate(self.rotary_dims) if dim not in allowed}
        if wrong:
            raise UnsupportedError(
                f"layers rotate different numbers of dims: {wrong} (layer: dims) next to layers "
                f"that rotate {allowed[1]}; every layer must rotate {allowed[1]} dims or none. "
                "Serve this model without --kv-compression"
            )
        for layer_idx, rotary_dim in enumerate(self.rotary_dims):
            if rotary_dim == 0 and bool(self.inv_freq[layer_idx].any()):
                raise UnsupportedError(
                    f"layer {layer_idx} rotates no dims but has frequencies other than zero; "
                    "the row of a layer without rotary embedding must be zeros"
                )

    @property
    def num_layers(self) -> int:
        """``L``."""
        return len(self.rotary_dims)

    @property
    def num_frequencies(self) -> int:
        """``F``, half of the rotated dims."""
        return self.inv_freq.shape[1]

    def select_layers(self, rows: Sequence[int]) -> "Rotary":
        """The parameters of some layers, by their row here; F is 0 where all are NoPE layers."""
        rotary_dims = tuple(self.rotary_dims[row] for row in rows)
        return Rotary(
            inv_freq=self.inv_freq[list(rows), : max(rotary_dims) // 2],
            attention_factor=self.attention_factor[list(rows)],
            rotary_dims=rotary_dims,
            interleaved=self.interleaved,
        )

    def inv_freq_hash(self) -> str:
        """Hash of the frequencies, for the fingerprint of a model.

        It covers the distinct rows, NoPE rows left out, so that every pipeline stage of a model
        whose layers share their frequencies computes the same. Three significant digits enter it:
        the last bits of float32 frequencies depend on the device that computed them.
        """
        rows = {
            ",".join(f"{frequency:.2e}" for frequency in self.inv_freq[layer_idx].tolist())
            for layer_idx, rotary_dim in enumerate(self.rotary_dims)
            if rotary_dim > 0
        }
        return hashlib.sha256(";".join(sorted(rows)).encode()).hexdigest()

    def un_rotate(self, query: Tensor, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Queries before RoPE: ``q_f = q'_f exp(-i w_f p) / m``.

        query: after RoPE, any float dtype [n, H, D]; positions: [n] integers.
        Returns complex128 pairs [n, H, F] (zeros in a NoPE layer) and the float64 dims
        [n, H, D - rotary_dim] that are not rotated, both on the device of query.
        """
        rotated, unrotated = self._split(query, positions, layer_idx)
        if self.rotary_dims[layer_idx] == 0:
            shape = (*query.shape[:2], self.num_frequencies)
            return torch.zeros(shape, dtype=torch.complex128, device=query.device), unrotated
        turn = phases(self.inv_freq[layer_idx].to(query.device), positions.to(query.device))
        pairs = pairs_from_dims(rotated, self.interleaved) * turn.conj().unsqueeze(1)
        return pairs / self.attention_factor[layer_idx].to(query.device), unrotated

    def _split(self, query: Tensor, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Rotated and unrotated dims of [n, H, D], in float64, after checking the shapes."""
        if not 0 <= layer_idx < self.num_layers:
            raise UnsupportedError(
                f"layer {layer_idx} was asked for; rotary parameters exist for layers 0 to "
                f"{self.num_layers - 1}"
            )
        rotary_dim = self.rotary_dims[layer_idx]
        if query.dim() != 3 or query.shape[2] < rotary_dim:
            raise UnsupportedError(
                f"queries of layer {layer_idx} have shape {list(query.shape)}; it must be "
                f"[n, H, D] with D of at least {rotary_dim}"
            )
        if list(positions.shape) != [query.shape[0]]:
            raise UnsupportedError(
                f"{query.shape[0]} queries came with positions of shape {list(positions.shape)}; "
                f"pass one position per query"
            )
        wide = query.to(torch.float64)
        return wide[..., :rotary_dim], wide[..., rotary_dim:]


def _check_float64(name: str, values: Tensor) -> None:
    if values.dtype != torch.float64:
        raise UnsupportedError(
            f"{name} is {values.dtype}; it must be float64: angles at long positions need it"
        )
    if not bool(values.isfinite().all()):
        raise UnsupportedError(
            f"{name} contains NaN or infinity; read it from the model's rotary module"
        )
