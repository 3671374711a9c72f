"""Statistics of one model's queries: what they hold, for which model, for which rank."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics.file import (
    MAKE_ANOTHER,
    explain_unreadable,
    read_file,
    write_file,
)
from triattention_vllm.method.statistics.fingerprint import Fingerprint

_TENSORS = ("centre_real", "centre_imag", "magnitude", "unrotated_mean")
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Statistics:
    """Means over calibration tokens of the queries before RoPE, per layer and query head.

    centre_real, centre_imag: ``qbar_f = E[q_f]``, float32 [L, H, F].
    magnitude: ``a_f = E|q_f|``, float32 [L, H, F]; never below ``|qbar_f|``.
    unrotated_mean: ``E[q_d]``, float32 [L, H, D]; zero on the dims that RoPE rotates.
    provenance: where they come from: tokens_seen, text, versions, created, schema_version.

    Raises StatisticsError where the tensors cannot be statistics of the fingerprint's model.
    """

    fingerprint: Fingerprint
    centre_real: Tensor
    centre_imag: Tensor
    magnitude: Tensor
    unrotated_mean: Tensor
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        model = self.fingerprint
        per_frequency = [model.num_layers, model.num_heads, model.num_frequencies]
        per_dim = [model.num_layers, model.num_heads, model.head_dim]
        for name, values in self._tensors().items():
            allowed = per_dim if name == "unrotated_mean" else per_frequency
            if list(values.shape) != allowed or values.dtype != torch.float32:
                raise StatisticsError(
                    f"{name} is {values.dtype} {list(values.shape)}; for this model it must be "
                    f"torch.float32 {allowed}"
                )
            if not bool(values.isfinite().all()):
                raise StatisticsError(f"{name} contains NaN or infinity")
        self._check_magnitude()
        for layer_idx, rotary_dim in enumerate(model.rotary_dims):
            if bool(self.unrotated_mean[layer_idx, :, :rotary_dim].any()):
                raise StatisticsError(
                    f"unrotated_mean of layer {model.layer_indices[layer_idx]} is not zero on the "
                    f"{rotary_dim} dims that RoPE rotates"
                )

    def _check_magnitude(self) -> None:
        """``E|q_f| >= |E[q_f]|``, up to the rounding of float32 sums."""
        centre = self.centre().abs()
        impossible = self.magnitude.double() < centre * (1 - _ROUNDING)
        if bool(impossible.any()):
            row, head_idx, frequency = impossible.nonzero()[0].tolist()
            raise StatisticsError(
                f"layer {self.fingerprint.layer_indices[row]}, query head {head_idx}, frequency "
                f"{frequency}: magnitude {float(self.magnitude[row, head_idx, frequency]):g} is "
                f"below |centre| {float(centre[row, head_idx, frequency]):g}, which no queries "
                "give"
            )

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "centre_real": self.centre_real,
            "centre_imag": self.centre_imag,
            "magnitude": self.magnitude,
            "unrotated_mean": self.unrotated_mean,
        }

    def centre(self) -> Tensor:
        """``qbar_f`` as complex128 [L, H, F]."""
        return torch.complex(self.centre_real.double(), self.centre_imag.double())

    def concentration(self) -> Tensor:
        """``R_f = |qbar_f| / a_f`` in [0, 1], float32 [L, H, F]; 0 where ``a_f`` is 0."""
        magnitude = self.magnitude.double()
        ratio = self.centre().abs() / magnitude.where(magnitude > 0, torch.ones(()).double())
        return ratio.clamp(max=1.0).float()

    def check_fits(self, running: Fingerprint) -> None:
        """Raise StatisticsError, naming both sides, unless these are the running model's."""
        mismatches = self.fingerprint.mismatches(running)
        if mismatches:
            raise StatisticsError(
                "the statistics belong to another model: "
                + "; ".join(mismatches)
                + "; run `triattention calibrate --model MODEL --output FILE` for the model that "
                "is served, or point `statistics` to its file"
            )

    def shard(self, layer_indices: Sequence[int], head_start: int, num_heads: int) -> "Statistics":
        """The layers and query heads of one parallel rank: heads ``[head_start, + num_heads)``.

        layer_indices: ascending decoder layer indices, as in the fingerprint.
        Raises StatisticsError for a layer or head that the statistics do not hold.
        """
        model = self.fingerprint
        row_of = {layer_idx: row for row, layer_idx in enumerate(model.layer_indices)}
        missing = [layer_idx for layer_idx in layer_indices if layer_idx not in row_of]
        if missing:
            raise StatisticsError(
                f"no statistics for layers {missing}; the file holds layers "
                f"{list(model.layer_indices)}; {MAKE_ANOTHER}"
            )
        if head_start < 0 or num_heads < 1 or head_start + num_heads > model.num_heads:
            raise StatisticsError(
                f"query heads {head_start} to {head_start + num_heads - 1} were asked for; the "
                f"statistics hold heads 0 to {model.num_heads - 1}; {MAKE_ANOTHER}"
            )
        rows = [row_of[layer_idx] for layer_idx in layer_indices]
        heads = slice(head_start, head_start + num_heads)
        fingerprint = replace(
            model,
            layer_indices=tuple(layer_indices),
            rotary_dims=tuple(model.rotary_dims[row] for row in rows),
            num_heads=num_heads,
            num_kv_heads=None,
        )
        frequencies = slice(fingerprint.num_frequencies)  # none where all these layers are NoPE
        return Statistics(
            fingerprint=fingerprint,
            centre_real=self.centre_real[rows, heads, frequencies],
            centre_imag=self.centre_imag[rows, heads, frequencies],
            magnitude=self.magnitude[rows, heads, frequencies],
            unrotated_mean=self.unrotated_mean[rows, heads],
            provenance=self.provenance,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the self-describing file atomically, readable by its owner only.

        Raises StatisticsError where the folder cannot be written.
        """
        write_file(Path(path), self._tensors(), self.fingerprint, self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read a file that save wrote.

        Raises StatisticsError, naming the path, for anything else: a missing, truncated or
        foreign file, another schema version, tensors of wrong shape or type, NaN, infinity.
        """
        name = os.fspath(path)
        try:
            tensors, fingerprint, provenance = read_file(name, _TENSORS)
            return cls(fingerprint=fingerprint, provenance=provenance, **tensors)
        except (OSError, SafetensorError) as error:
            raise explain_unreadable(name, error) from error
        except StatisticsError as error:
            raise StatisticsError(f"statistics file {name}: {error}; {MAKE_ANOTHER}") from error
