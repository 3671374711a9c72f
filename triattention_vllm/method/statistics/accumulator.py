"""Statistics from queries, one batch at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics.file import new_provenance
from triattention_vllm.method.statistics.fingerprint import Fingerprint
from triattention_vllm.method.statistics.statistics import Statistics


class StatisticsAccumulator:
    """Sums of ``q_f``, ``|q_f|`` and unrotated ``q_d`` per layer and query head, in float64.

    num_heads, head_dim: H of the queries that add receives, and D.
    rotary_dims: rotated dims per layer, 2F or 0. Layers are counted 0 to L - 1 here, in the
    order of the fingerprint's layer_indices. All sums live on the CPU.
    """

    def __init__(self, num_heads: int, head_dim: int, rotary_dims: Sequence[int]) -> None:
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rotary_dims = tuple(rotary_dims)
        shape = (len(self.rotary_dims), num_heads, max(self.rotary_dims) // 2)
        self._pair_sums = torch.zeros(shape, dtype=torch.complex128)
        self._magnitude_sums = torch.zeros(shape, dtype=torch.float64)
        self._unrotated_sums = torch.zeros((*shape[:2], head_dim), dtype=torch.float64)
        self._num_tokens = [0] * len(self.rotary_dims)

    def add(self, layer_idx: int, query_pairs: Tensor, unrotated: Tensor) -> None:
        """Add n queries of one layer, as Rotary.un_rotate returns them.

        query_pairs: complex [n, H, F] (zeros in a NoPE layer); unrotated: [n, H, D - rotary_dim].
        Synchronises with the device that holds them. Raises StatisticsError on another shape, and
        on NaN or infinity, without adding anything.
        """
        if not 0 <= layer_idx < len(self.rotary_dims):
            raise StatisticsError(
                f"queries of layer {layer_idx} were added; layers 0 to "
                f"{len(self.rotary_dims) - 1} exist"
            )
        rotary_dim = self.rotary_dims[layer_idx]
        num_tokens = query_pairs.shape[0]
        pairs_shape = [num_tokens, *self._pair_sums.shape[1:]]
        unrotated_shape = [num_tokens, self.num_heads, self.head_dim - rotary_dim]
        if list(query_pairs.shape) != pairs_shape or list(unrotated.shape) != unrotated_shape:
            raise StatisticsError(
                f"queries of layer {layer_idx} have pairs {list(query_pairs.shape)} and unrotated "
                f"dims {list(unrotated.shape)}; they must be {pairs_shape} and {unrotated_shape}"
            )
        pairs = query_pairs.to(torch.complex128)
        pair_sum = pairs.sum(0).cpu()
        magnitude_sum = pairs.abs().sum(0).cpu()
        unrotated_sum = unrotated.to(torch.float64).sum(0).cpu()
        # A NaN or infinite query makes its sum NaN or infinite.
        if not bool(magnitude_sum.isfinite().all() and unrotated_sum.isfinite().all()):
            raise StatisticsError(
                f"queries of layer {layer_idx} contain NaN or infinity; check that the model "
                "generates sensible text at this dtype, or calibrate with another text"
            )
        self._pair_sums[layer_idx] += pair_sum
        self._magnitude_sums[layer_idx] += magnitude_sum
        self._unrotated_sums[layer_idx, :, rotary_dim:] += unrotated_sum
        self._num_tokens[layer_idx] += num_tokens

    def finish(self, fingerprint: Fingerprint, text: str, versions: str) -> Statistics:
        """The means, as statistics of the fingerprint's model.

        text: which calibration text was read; versions: of the software that read it.
        Raises StatisticsError where a layer has seen no token.
        """
        empty = [layer_idx for layer_idx, seen in enumerate(self._num_tokens) if seen == 0]
        if empty:
            raise StatisticsError(
                f"no queries were recorded in layers {empty} of {len(self._num_tokens)}; run a "
                "calibration text of at least one token through every attention layer"
            )
        num_tokens = torch.tensor(self._num_tokens, dtype=torch.float64).reshape(-1, 1, 1)
        centre = self._pair_sums / num_tokens
        return Statistics(
            fingerprint=fingerprint,
            centre_real=centre.real.float(),
            centre_imag=centre.imag.float(),
            magnitude=(self._magnitude_sums / num_tokens).float(),
            unrotated_mean=(self._unrotated_sums / num_tokens).float(),
            provenance=new_provenance(str(min(self._num_tokens)), text, versions),
        )
