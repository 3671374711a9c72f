"""How far a head can look: what its mean query still gives a matching key at some distance.

    g(d) = sum_f |qbar_f| cos(w_f d) / sum_f |qbar_f|

is the distance term of the score for a key that matches the head's centre in every frequency at
distance 0, as a share of what it gives there: 1 at distance 0, and falling as fast as the head's
fast frequencies weigh. The files know queries only, so this says at which scale of distance a head
tells keys apart, not at which distance the keys of a text happen to match best.
"""

from collections import Counter

import torch
from torch import Tensor

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.score_triattention import OFFSETS
from triattention_vllm.method.statistics import Statistics

LOCAL, RANGE, SINKS, NO_ROPE = "local", "range", "sinks", "no RoPE"
LOCAL_REACH = 128
"""Up to here a head is local: what it looks at lies in the paper's window, mostly."""
SINKS_REACH = 16384
"""From here on a head rates the first tokens of most texts nearly as if they were near."""


def read_frequencies(statistics: Statistics, model: str | None, theta: float | None) -> Tensor:
    """``w_f`` as float64 [F], from a model's configuration or a plain RoPE base.

    Raises StatisticsError where the file says that the model rotates by other frequencies.
    """
    fingerprint = statistics.fingerprint
    rotary_dim = 2 * fingerprint.num_frequencies
    if model is not None:
        frequencies, source = _of_model(model, rotary_dim), model
    else:
        assert theta is not None, "one of both is given"
        steps = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
        frequencies, source = theta ** (-steps / rotary_dim), f"--rope-theta {theta:g}"
    if len(frequencies) != fingerprint.num_frequencies:
        raise StatisticsError(
            f"{source} gives {len(frequencies)} frequencies and the file has "
            f"{fingerprint.num_frequencies}; name the model that the file was made for"
        )
    rows = [frequencies * (dim > 0) for dim in fingerprint.rotary_dims]
    rotary = Rotary(
        inv_freq=torch.stack(rows),
        attention_factor=torch.ones(fingerprint.num_layers, dtype=torch.float64),
        rotary_dims=fingerprint.rotary_dims,
        interleaved=fingerprint.interleaved,
    )
    if fingerprint.inv_freq_hash not in (None, rotary.inv_freq_hash()):
        raise StatisticsError(
            f"{source} gives other frequencies than those that the file was made with; name the "
            "model that the file was made for"
        )
    return frequencies


def _of_model(model: str, rotary_dim: int) -> Tensor:
    """Frequencies by transformers' rule for the model's RoPE type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from triattention_vllm.tools.model_shape import read_config

    text = read_config(model).get_text_config()
    parameters = vars(text).get("rope_parameters") or {}
    if "rope_theta" not in parameters:
        raise StatisticsError(
            f"{model} has no single RoPE base in its configuration; give it with --rope-theta"
        )
    if parameters.get("rope_type", "default") == "default":
        steps = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
        return torch.as_tensor(parameters["rope_theta"] ** (-steps / rotary_dim))
    frequencies, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](text, torch.device("cpu"))
    return torch.as_tensor(frequencies).double()


def preference(statistics: Statistics, frequencies: Tensor, distances: Tensor) -> Tensor:
    """``g(d)`` of every head: [L, H, distances], float64. NaN where a head has no centre."""
    weights = statistics.centre().abs()
    weights = weights / weights.sum(-1, keepdim=True)
    turns = torch.cos(frequencies.unsqueeze(1) * distances.double())  # [F, distances]
    return weights @ turns


def reach(statistics: Statistics, frequencies: Tensor) -> Tensor:
    """Largest offset ``d`` of the score up to which ``g >= 1/2`` at every offset: int64 [L, H];
    0 where it is less at the first. A single fast frequency comes back later, by chance."""
    offsets = torch.tensor(OFFSETS)
    lowest = preference(statistics, frequencies, offsets).cummin(-1).values
    return ((lowest >= 0.5) * offsets).amax(-1)


def kind(tokens: int, rotary_dim: int) -> str:
    """``local`` up to 128 tokens of reach, ``sinks`` from 16384 on, ``range`` between."""
    if rotary_dim == 0:
        return NO_ROPE
    if tokens <= LOCAL_REACH:
        return LOCAL
    return SINKS if tokens >= SINKS_REACH else RANGE


def kinds(statistics: Statistics, reaches: Tensor) -> list[list[str]]:
    """The kind of every head, by layer."""
    dims = statistics.fingerprint.rotary_dims
    return [
        [kind(tokens, dim) for tokens in row]
        for row, dim in zip(reaches.tolist(), dims, strict=True)
    ]


def count_kinds(found: list[list[str]]) -> dict[str, int]:
    """How many heads are of each kind that occurs."""
    counts = Counter(name for row in found for name in row)
    return {name: counts[name] for name in (LOCAL, RANGE, SINKS, NO_ROPE) if counts[name]}
