"""Settings of the score's variants, and what they are under one name."""

from collections.abc import Mapping
from types import NoneType
from typing import Literal, get_args

from triattention_vllm.description import Description

Normalise = Literal["heads", "none"]
LayersTogether = Literal["mean", "max"]
NormTerm = Literal["full", "none"]
Preset = Literal["paper"]

NORMALISE = Description(
    "Whether each query head's scores are normalised over the candidates before heads and layers "
    "are compared.",
    (str,),
    choices=get_args(Normalise),
)
LAYERS = Description(
    "With selection=per_head: how the scores of the layers are put together.",
    (str,),
    choices=get_args(LayersTogether),
)
NORM_TERM = Description(
    "With method=triattention: whether the score has a term for queries far from their mean, by "
    "the length of the key.",
    (str,),
    choices=get_args(NormTerm),
)
OFFSETS = Description(
    "With method=triattention: distances of the next queries over which the score is a mean. "
    "geometric: 1, 2, 4, ... up to 65536; short: up to max_model_len; or a list such as 1,8,64.",
    (str,),
    choices=("geometric", "short"),
    pattern="[0-9]{1,7}(,[0-9]{1,7})*",
    form="numbers with commas between them",
)
USUAL_REDUNDANCY = 50
REDUNDANCY = Description(
    "Lowers the score of a token whose value later tokens repeat, by this percent of the logarithm "
    "of how often. Unset: 50 with method=triattention, compaction=repack and "
    "score_normalise=heads, else 0.",
    (int, NoneType),
    unit="percent",
    maximum=1000,
)
PROTECT_VALUES = Description(
    "Survivors that are chosen by the length of their value, the longest, whatever their score.",
    (int,),
    unit="percent",
    maximum=100,
)
PRESET = Description(
    "Settings under one name. paper: as published (interval and window 128, protect=prompt, no "
    "redundancy); any of its settings that is given otherwise is refused.",
    (str, NoneType),
    choices=get_args(Preset),
)

PRESETS: Mapping[Preset | None, Mapping[str, str | int]] = {
    "paper": {
        "method": "triattention",
        "interval": 128,
        "window": 128,
        "protect": "prompt",
        "selection": "per_head",
        "score_normalise": "heads",
        "score_layers": "mean",
        "score_norm_term": "full",
        "score_offsets": "geometric",
        "score_redundancy": 0,
        "score_protect_values": 0,
    }
}
"""What each preset sets. ``paper``: arXiv 2604.04921, whose budgets are from 512 to 4096 tokens."""
