"""Rotary parameters of attention modules of transformers, as vLLM's Transformers backend runs
them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from triattention_vllm.engine.rotary_transformers import read_transformers_layer
from triattention_vllm.engine.rotary_types import LayerRotary
from triattention_vllm.errors import SeamError, UnsupportedError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
HEAD_DIM = 32


def build(config_class: type[Any], **changes: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **changes}))


def read_all(model: nn.Module) -> list[LayerRotary]:
    owners = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert len(owners) == SIZES["num_hidden_layers"]
    attention = SimpleNamespace(head_size=HEAD_DIM)
    return [read_transformers_layer(model, owner, attention) for owner in owners]


def frequencies(theta: float, rotary_dim: int = HEAD_DIM) -> torch.Tensor:
    return theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def test_a_quarter_of_a_gpt_neox_head_is_rotated_in_halves() -> None:
    parameters = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    model = build(transformers.GPTNeoXConfig, rope_parameters=parameters)
    for layer in read_all(model):
        assert (layer.rotary_dim, layer.interleaved, layer.attention_factor) == (8, False, 1.0)
        assert torch.allclose(layer.inv_freq, frequencies(5000.0, 8), rtol=1e-6)


def test_glm_pairs_neighbouring_dims() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = build(transformers.GlmConfig, head_dim=HEAD_DIM, rope_parameters=parameters)
    for layer in read_all(model):
        assert (layer.rotary_dim, layer.interleaved) == (16, True)
        assert torch.allclose(layer.inv_freq, frequencies(1e4, 16), rtol=1e-6)


def test_smollm3_leaves_some_layers_without_rotation() -> None:
    model = build(transformers.SmolLM3Config, no_rope_layers=[1, 1, 1, 0])
    assert [layer.rotary_dim for layer in read_all(model)] == [HEAD_DIM] * 3 + [0]


def test_frequencies_may_depend_on_the_type_of_a_layer() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e5,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
    }
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": yarn,
    }
    model = build(transformers.Olmo3Config, layer_types=types, rope_parameters=parameters)
    sliding, full, *_ = read_all(model)
    assert torch.allclose(sliding.inv_freq, frequencies(1e4), rtol=1e-6)
    assert sliding.attention_factor == 1.0
    assert full.attention_factor > 1.0
    assert full.inv_freq[-1] < frequencies(1e5)[-1] / 7


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build(transformers.OlmoConfig, rope_parameters=parameters)
    with pytest.raises(UnsupportedError, match="'dynamic', whose frequencies may change"):
        read_all(model)


def test_frequencies_that_were_cast_are_refused() -> None:
    model = build(transformers.OlmoConfig).to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        read_all(model)


def test_a_patched_module_is_refused() -> None:
    model = build(transformers.OlmoConfig)
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, positions: plain(x, positions * 2)
    with pytest.raises((SeamError, UnsupportedError)):
        read_all(model)
