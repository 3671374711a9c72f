"""Rotary parameters read from vLLM's own modules."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import vllm.model_executor.models
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as phi3

from triattention_vllm.engine.differences import LINE
from triattention_vllm.engine.rotary import read_rotary
from triattention_vllm.engine.rotary_calls import CONDITIONS, conditions_in
from triattention_vllm.errors import SeamError, UnsupportedError

HEAD_DIM = 64
THETA = 500_000.0
ORIGINAL = 2048


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    """vLLM's modules ask for the configuration that is being built."""
    with set_current_vllm_config(VllmConfig()):
        yield


class RotatingAttention(nn.Module):
    """Holds a rotary embedding and an attention layer, as vLLM's attention modules do."""

    def __init__(self, layer_idx: int, rotary_emb: nn.Module | None) -> None:
        super().__init__()
        self.rotary_emb = rotary_emb
        attn = Attention.__new__(Attention)
        nn.Module.__init__(attn)
        attn.layer_name = f"model.layers.{layer_idx}.self_attn.attn"
        attn.head_size = HEAD_DIM
        self.attn = attn

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k)


class CohereLikeAttention(RotatingAttention):
    v1 = False

    def __init__(self, layer_idx: int, rotary_emb: nn.Module, sliding_window: int | None) -> None:
        super().__init__(layer_idx, rotary_emb)
        self.sliding_window = sliding_window

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.v1 or self.sliding_window:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k)


class MoodyAttention(RotatingAttention):
    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.attn.head_size > 32:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k)


def rope(dtype: torch.dtype = torch.float32, neox: bool = True, **parameters: object) -> nn.Module:
    parameters = {"rope_type": "default", "rope_theta": THETA, **parameters}
    max_position = int(parameters.pop("max_position", 4096))
    return get_rope(HEAD_DIM, max_position, neox, parameters, dtype)


def read(*owners: RotatingAttention):
    model = nn.ModuleList(owners)
    return read_rotary(model, [owner.attn.layer_name for owner in owners])


def transformers_frequencies(
    rope_type: str, seq_len: int | None = None, max_position: int = ORIGINAL, **parameters: object
) -> tuple[Tensor, float]:
    parameters = {"rope_type": rope_type, "rope_theta": THETA, **parameters}
    config = transformers.LlamaConfig(
        head_dim=HEAD_DIM,
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=max_position,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)


def assert_same_frequencies(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected.double(), rtol=2e-6, atol=0.0)


def test_plain_frequencies_are_theta_to_the_power_of_minus_2f_over_d() -> None:
    rotary = read(RotatingAttention(0, rope()), RotatingAttention(1, rope()))
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    assert_same_frequencies(rotary.inv_freq[0], THETA**-exponents)
    assert torch.equal(rotary.inv_freq[0], rotary.inv_freq[1])
    assert rotary.rotary_dims == (HEAD_DIM, HEAD_DIM)
    assert not rotary.interleaved
    assert rotary.attention_factor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("rope_type", "parameters"),
    [
        ("linear", {"factor": 4.0}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
        pytest.param(
            "yarn",
            {
                "factor": 16.0,
                "original_max_position_embeddings": ORIGINAL,
                "beta_fast": 24.0,
                "beta_slow": 2.0,
                "attention_factor": 1.25,
            },
            marks=pytest.mark.skipif(
                LINE < (0, 30), reason="vLLM does not read yarn's attention_factor through 0.29"
            ),
        ),
    ],
)
def test_scaled_frequencies_equal_those_of_transformers(
    rope_type: str, parameters: dict[str, float]
) -> None:
    rotary = read(RotatingAttention(0, rope(rope_type=rope_type, **parameters)))
    expected, factor = transformers_frequencies(rope_type, **parameters)
    assert_same_frequencies(rotary.inv_freq[0], expected)
    assert rotary.attention_factor[0].item() == pytest.approx(factor, rel=1e-9)
    if rope_type == "yarn":
        assert factor > 1.0


def test_dynamic_scaling_is_read_at_the_length_that_vllm_fixed() -> None:
    module = rope(
        rope_type="dynamic", factor=2.0, max_trained_positions=ORIGINAL, max_position=3 * ORIGINAL
    )
    expected, _ = transformers_frequencies("dynamic", seq_len=3 * ORIGINAL, factor=2.0)
    assert_same_frequencies(read(RotatingAttention(0, module)).inv_freq[0], expected)


@pytest.mark.parametrize("max_model_len", [ORIGINAL, 4 * ORIGINAL])
def test_longrope_takes_the_factors_that_vllm_chose(
    max_model_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [1.0 + 0.01 * idx for idx in range(HEAD_DIM // 2)]
    long = [2.0 + 0.5 * idx for idx in range(HEAD_DIM // 2)]
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    monkeypatch.setattr(phi3, "get_current_vllm_config", lambda: config)
    parameters = {
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": ORIGINAL,
    }
    # A length enters the parameters, so that get_rope does not return an earlier module.
    module = rope(
        rope_type="longrope", max_position=4 * ORIGINAL, marker=max_model_len, **parameters
    )
    rotary = read(RotatingAttention(0, module))
    expected, factor = transformers_frequencies(
        "longrope", seq_len=max_model_len, max_position=4 * ORIGINAL, factor=4.0, **parameters
    )
    assert_same_frequencies(rotary.inv_freq[0], expected)
    assert rotary.attention_factor[0].item() == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_a_bfloat16_model_still_gives_full_precision(rope_type: str) -> None:
    parameters = {"rope_type": rope_type}
    if rope_type == "yarn":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    coarse = rope(torch.bfloat16, max_position=32768, **parameters)
    assert coarse.cos_sin_cache.dtype == torch.bfloat16
    fine = rope(torch.float32, max_position=32768, **parameters)
    found = read(RotatingAttention(0, coarse)).inv_freq
    assert torch.equal(found, read(RotatingAttention(0, fine)).inv_freq)
    assert not torch.equal(found, found.bfloat16().double())


def test_interleaved_pairing_and_partial_rotation_are_read() -> None:
    rotary = read(RotatingAttention(0, rope(neox=False, partial_rotary_factor=0.25)))
    assert rotary.interleaved
    assert rotary.rotary_dims == (HEAD_DIM // 4,)
    assert rotary.inv_freq.shape == (1, HEAD_DIM // 8)


def test_each_layer_has_its_own_theta() -> None:
    owners = [RotatingAttention(0, rope(rope_theta=1e4)), RotatingAttention(1, rope())]
    rotary = read(*owners)
    assert rotary.inv_freq[0, -1] > 10 * rotary.inv_freq[1, -1]


def test_text_positions_of_multimodal_rotary_are_plain() -> None:
    module = rope(mrope_section=[8, 12, 12])
    assert type(module).__name__ == "MRotaryEmbedding"
    found = read(RotatingAttention(0, module)).inv_freq
    assert torch.equal(found, read(RotatingAttention(0, rope())).inv_freq)


def test_layers_without_rotary_embedding_have_zero_rows() -> None:
    rotary = read(RotatingAttention(0, rope()), RotatingAttention(1, None))
    assert rotary.rotary_dims == (HEAD_DIM, 0)
    assert not rotary.inv_freq[1].any()


def test_a_rotary_module_that_a_layer_skips_is_not_read() -> None:
    rotary = read(CohereLikeAttention(0, rope(), 128), CohereLikeAttention(1, rope(), None))
    assert rotary.rotary_dims == (HEAD_DIM, 0)


def test_an_unknown_condition_around_the_rotation_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"MoodyAttention .*head_size > 32"):
        read(MoodyAttention(0, rope()))


def test_a_rotary_module_held_elsewhere_is_refused() -> None:
    model = nn.ModuleDict({"layer": RotatingAttention(0, None), "rotary": rope()})
    with pytest.raises(UnsupportedError, match="the model has one at 'rotary'"):
        read_rotary(model, ["model.layers.0.self_attn.attn"])


def test_a_layer_that_is_not_in_the_model_is_named() -> None:
    with pytest.raises(SeamError, match="model.layers.7"):
        read_rotary(
            nn.ModuleList([RotatingAttention(0, rope())]), ["model.layers.7.self_attn.attn"]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_theta_that_is_not_the_tables_is_refused(dtype: torch.dtype) -> None:
    module = RotaryEmbedding(HEAD_DIM, HEAD_DIM, 32768, 1_000_000.0, True, dtype)
    assert read(RotatingAttention(0, module)).num_layers == 1
    module.base = 10_000.0
    with pytest.raises(SeamError, match="does not rotate with the frequencies computed"):
        read(RotatingAttention(0, module))


def test_tables_with_nan_are_refused() -> None:
    module = RotaryEmbedding(HEAD_DIM, HEAD_DIM, 128, THETA, True, torch.float32)
    module.cos_sin_cache[5] = torch.nan
    with pytest.raises(SeamError, match="does not rotate"):
        read(RotatingAttention(0, module))


def test_an_unknown_rotary_class_is_refused_by_name() -> None:
    class SpiralRotaryEmbedding(RotaryEmbedding):
        pass

    module = SpiralRotaryEmbedding(HEAD_DIM, HEAD_DIM, 128, THETA, True, torch.float32)
    with pytest.raises(UnsupportedError, match="SpiralRotaryEmbedding"):
        read(RotatingAttention(0, module))


def test_layers_that_pair_differently_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="pair their dims differently"):
        read(RotatingAttention(0, rope()), RotatingAttention(1, rope(neox=False)))


def test_every_conditional_rotation_of_vllm_is_known() -> None:
    folder = Path(vllm.model_executor.models.__file__).parent
    num_conditional = 0
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or "Attention" not in node.name:
                continue
            if any(part in node.name for part in ("Audio", "Vision", "Siglip")):
                continue
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            found = {
                condition
                for method in methods
                if method.name != "__init__"
                for condition in conditions_in(method)
            }
            assert found <= set(CONDITIONS), f"{file.name}: {node.name}"
            num_conditional += bool(found)
    assert num_conditional > 5
