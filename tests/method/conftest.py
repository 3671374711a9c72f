"""Small models, queries and statistics for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint, Statistics

REPOSITORY = Path(__file__).resolve().parents[2]


def _fingerprint(
    layer_indices: tuple[int, ...] = (0, 1, 2),
    num_heads: int = 4,
    num_kv_heads: int | None = 2,
    head_dim: int = 8,
    rotary_dims: tuple[int, ...] | None = None,
    interleaved: bool = False,
) -> Fingerprint:
    return Fingerprint(
        architecture="TinyForCausalLM",
        layer_indices=layer_indices,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dims=rotary_dims or (head_dim,) * len(layer_indices),
        interleaved=interleaved,
        inv_freq_hash="frequencies",
        weights_hash="weights",
    )


def _statistics(fingerprint: Fingerprint | None = None, seed: int = 0) -> Statistics:
    model = fingerprint or _fingerprint()
    generator = torch.Generator().manual_seed(seed)
    per_frequency = (model.num_layers, model.num_heads, model.num_frequencies)
    centre = torch.randn(*per_frequency, dtype=torch.complex64, generator=generator)
    excess = torch.rand(per_frequency, generator=generator)
    unrotated = torch.randn(model.num_layers, model.num_heads, model.head_dim, generator=generator)
    for row, rotary_dim in enumerate(model.rotary_dims):
        unrotated[row, :, :rotary_dim] = 0
        if rotary_dim == 0:
            centre[row] = 0
            excess[row] = 0
    return Statistics(
        fingerprint=model,
        centre_real=centre.real.contiguous(),
        centre_imag=centre.imag.contiguous(),
        magnitude=centre.abs() + excess,
        unrotated_mean=unrotated,
        provenance={"tokens_seen": "10", "text": "test", "schema_version": "1"},
    )


def _rotary(
    rotary_dims: tuple[int, ...] = (8, 8, 8),
    interleaved: bool = False,
    theta: float = 10000.0,
    attention_factor: float = 1.0,
) -> Rotary:
    num_frequencies = max(rotary_dims) // 2
    row = theta ** (-torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
    is_rotated = torch.tensor(rotary_dims, dtype=torch.float64).clamp(max=1).unsqueeze(1)
    return Rotary(
        inv_freq=is_rotated * row,
        attention_factor=torch.full((len(rotary_dims),), attention_factor, dtype=torch.float64),
        rotary_dims=rotary_dims,
        interleaved=interleaved,
    )


@pytest.fixture(scope="session")
def make_fingerprint() -> Callable[..., Fingerprint]:
    """A fingerprint of three layers, four query heads over two KV heads, head_dim 8."""
    return _fingerprint


@pytest.fixture(scope="session")
def make_statistics() -> Callable[..., Statistics]:
    """Random statistics of a fingerprint."""
    return _statistics


@pytest.fixture(scope="session")
def make_rotary() -> Callable[..., Rotary]:
    """Rotary parameters with the usual frequencies ``theta^(-f/F)``."""
    return _rotary


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the repository; the test is skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there is no folder shared/data beside the repository")
    return folder
