"""Calibration in vLLM equals means over transformers' queries before RoPE, in float64."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from dense_reference import in_float64
from fresh_process import run_script
from tiny_model import write_tiny_model
from tiny_models import CONFIGS, write_model
from vllm_limits import CPU_SINKS_MAY_BE_FLOAT32

from triattention_vllm.engine.differences import TRANSFORMERS_LAYERS_ARE_IN_THE_TREE
from triattention_vllm.method.statistics import Statistics
from triattention_vllm.texts import shipped_text

MAX_MODEL_LEN = 1024
TEXT = shipped_text()[10_000:15_000]

# Where a family's queries come from: the module whose output they are, and their place in it.
QUERY_MODULES = {
    "qwen3": "self_attn.q_norm",
    "llama3": "self_attn.q_proj",
    "gptj": "attn.q_proj",
    "gpt_neox": "attention.query_key_value",
    "gemma3": "self_attn.q_norm",
    "gpt_oss": "self_attn.q_proj",
    "smollm3": "self_attn.q_proj",
    "qwen3_next": "self_attn.q_norm",
}
FULL_ATTENTION_LAYERS = {
    "qwen3": (0, 1),
    "llama3": (0, 1, 2),
    "gptj": (0, 1, 2),
    "gpt_neox": (0, 1, 2),
    "gemma3": (1, 2, 4, 5),
    "gpt_oss": (1, 3),
    "smollm3": (0, 1, 2, 3),
    "qwen3_next": (1, 3),
}
HEADS_FIRST = ("gemma3",)
PARTLY_ROTATED = ("gptj", "gpt_neox", "qwen3_next")
IN_BFLOAT16_ONLY = ("qwen3_next",) if CPU_SINKS_MAY_BE_FLOAT32 else ("qwen3_next", "gpt_oss")
REFUSED = () if TRANSFORMERS_LAYERS_ARE_IN_THE_TREE else ("smollm3",)
IN_BFLOAT16 = ("qwen3", "qwen3_next")
UNROTATED_LAYERS = {"smollm3": (2,)}

# Largest difference of any mean, for queries of magnitude 2 to 3. In float32 only the rounding of
# the model is left (1e-6 measured). bfloat16 has 8 bits, and the rounding of weights and of the
# normalised query does not average out: 2^-8 of the largest queries, near 6.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8 * 8}


def write_family(family: str, folder: Path) -> Path:
    if family == "qwen3":
        return write_tiny_model(folder, num_layers=2, hidden_size=128, head_dim=32)
    return write_model(folder, family)


def calibrated(model: Path, folder: Path, **engine_arguments: object) -> Statistics:
    """Statistics that a stock engine makes in a process of its own."""
    output = folder / "made.safetensors"
    job = {
        "model": str(model),
        "text": TEXT,
        "output": str(output),
        "engine": {"max_model_len": MAX_MODEL_LEN, "enforce_eager": True, **engine_arguments},
    }
    run_script(Path(__file__).with_name("stock_engine.py"), job)
    return Statistics.load(output)


def transformers_queries(
    family: str, model: Path, num_heads: int, head_dim: int
) -> dict[int, np.ndarray]:
    """Queries before RoPE of all segments by layer, float64 [tokens, H, head_dim]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.encode(TEXT)
    num_segments = math.ceil(len(tokens) / (MAX_MODEL_LEN - 1))
    assert num_segments > 1
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    )
    reference = in_float64(reference)
    recorded: dict[int, list[torch.Tensor]] = {}
    for name, module in reference.named_modules():
        if name.endswith(QUERY_MODULES[family]):
            (layer,) = map(int, re.findall(r"\.(\d+)\.", name))
            outputs = recorded.setdefault(layer, [])
            module.register_forward_hook(lambda _m, _i, out, outputs=outputs: outputs.append(out))
    with torch.no_grad():
        for number in range(num_segments):
            start = len(tokens) * number // num_segments
            end = len(tokens) * (number + 1) // num_segments
            reference(torch.tensor([tokens[start:end]]))
    layers = {}
    for layer, outputs in recorded.items():
        # gpt_neox projects queries, keys and values of a head next to each other.
        tokens_first = [out.transpose(1, 2) if family in HEADS_FIRST else out for out in outputs]
        heads = [
            out[0].reshape(out.shape[1], num_heads, -1)[..., :head_dim] for out in tokens_first
        ]
        layers[layer] = torch.cat(heads).numpy()
    return layers


def expected_means(
    queries: np.ndarray, rotary_dim: int, interleaved: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``E[q_f]``, ``E|q_f|`` [heads, F] and ``E[q_d]`` of the unrotated dims, of one layer."""
    num_frequencies = rotary_dim // 2
    if interleaved:
        x, y = queries[..., :rotary_dim:2], queries[..., 1:rotary_dim:2]
    else:
        x, y = queries[..., :num_frequencies], queries[..., num_frequencies:rotary_dim]
    centre = x.mean(axis=0) + 1j * y.mean(axis=0)
    magnitude = np.sqrt(x * x + y * y).mean(axis=0)
    return centre, magnitude, queries[..., rotary_dim:].mean(axis=0)


def largest_differences(family: str, model: Path, made: Statistics) -> dict[str, float]:
    fingerprint = made.fingerprint
    of_layers = transformers_queries(family, model, fingerprint.num_heads, fingerprint.head_dim)
    largest = dict.fromkeys(("centre", "magnitude", "unrotated"), 0.0)
    for idx, layer in enumerate(fingerprint.layer_indices):
        rotary_dim = fingerprint.rotary_dims[idx]
        assert len(of_layers[layer]) == int(made.provenance["tokens_seen"])
        expected = expected_means(of_layers[layer], rotary_dim, fingerprint.interleaved)
        found = (
            made.centre().numpy()[idx, :, : rotary_dim // 2],
            made.magnitude.numpy()[idx, :, : rotary_dim // 2],
            made.unrotated_mean.numpy()[idx, :, rotary_dim:],
        )
        for name, left, right in zip(largest, found, expected, strict=True):
            assert left.shape == right.shape
            largest[name] = max(largest[name], float(np.abs(left - right).max(initial=0.0)))
    return largest


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        # vLLM's linear attention computes in bfloat16 only on a CPU.
        *((name, "float32") for name in QUERY_MODULES if name not in IN_BFLOAT16_ONLY + REFUSED),
        *((family, "bfloat16") for family in IN_BFLOAT16),
    ],
)
def test_calibration_equals_transformers_in_float64(
    family: str, dtype: str, tmp_path: Path
) -> None:
    model = write_family(family, tmp_path / "model")
    made = calibrated(model, tmp_path, dtype=dtype)
    fingerprint = made.fingerprint
    assert fingerprint.interleaved == (family == "gptj")
    assert fingerprint.layer_indices == FULL_ATTENTION_LAYERS[family]
    partly = {0 < dim < fingerprint.head_dim for dim in fingerprint.rotary_dims}
    assert partly == {family in PARTLY_ROTATED}
    unrotated = tuple(idx for idx, dim in enumerate(fingerprint.rotary_dims) if dim == 0)
    assert unrotated == UNROTATED_LAYERS.get(family, ())
    differences = largest_differences(family, model, made)
    assert max(differences.values()) < TOLERANCE[dtype], differences
    assert 0.3 < float(made.concentration().mean()) < 1.0


def test_every_family_of_the_support_models_that_is_not_refused_is_calibrated() -> None:
    never_compressed = {"bloom", "gemma3n"}  # no rotary embedding; layers that share a cache
    assert set(QUERY_MODULES) == {"qwen3", *CONFIGS} - never_compressed
