"""Statistics of a model of two layers and two heads, for tests of files and folders."""

import torch

from triattention_vllm.method.statistics import Fingerprint, Statistics

MODEL = Fingerprint(
    architecture="Tiny/ForCausalLM",
    layer_indices=(0, 3),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dims=(4, 4),
    interleaved=False,
    inv_freq_hash="a",
    weights_hash="b",
)


def some_statistics(fingerprint: Fingerprint = MODEL) -> Statistics:
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn(2, 2, 2, 2, generator=generator)
    unrotated = torch.randn(2, 2, 8, generator=generator)
    unrotated[..., :4] = 0.0
    provenance = {"tokens_seen": "9000", "text": "a text"}
    magnitude = centre.norm(dim=0) + 1.0
    return Statistics(fingerprint, centre[0], centre[1], magnitude, unrotated, provenance)
