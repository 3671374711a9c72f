"""Calibration in vLLM equals means over transformers' queries before RoPE, in float64."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_dense_reference import in_float64
from tiny_models import CONFIGS, write_model

from triattention_vllm.method.statistics import Statistics
from triattention_vllm.texts import shipped_text
from triattention_vllm.tools.tiny_model import write_tiny_model

MAX_MODEL_LEN = 1024
TEXT = shipped_text()[10_000:15_000]

# Where a family's queries come from: the module whose output they are, and their place in it.
QUERY_MODULES = {
    "qwen3": "self_attn.q_norm",
    "llama3": "self_attn.q_proj",
    "gptj": "attn.q_proj",
    "gpt_neox": "attention.query_key_value",
}
PARTLY_ROTATED = ("gptj", "gpt_neox")

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
    text, output = folder / "text.txt", folder / "made.safetensors"
    text.write_text(TEXT, encoding="utf-8")
    arguments = {"max_model_len": MAX_MODEL_LEN, "enforce_eager": True, **engine_arguments}
    script = Path(__file__).with_name("stock_engine.py")
    command = [sys.executable, script, model, text, output, json.dumps(arguments)]
    process = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, env=os.environ
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return Statistics.load(output)


def transformers_queries(family: str, model: Path, num_heads: int, head_dim: int) -> np.ndarray:
    """Queries before RoPE of all segments, float64 [layers, tokens, heads, head_dim]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.encode(TEXT)
    num_segments = math.ceil(len(tokens) / (MAX_MODEL_LEN - 1))
    assert num_segments > 1
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    reference = in_float64(reference)
    recorded: dict[str, list[torch.Tensor]] = {}
    for name, module in reference.named_modules():
        if name.endswith(QUERY_MODULES[family]):
            outputs = recorded.setdefault(name, [])
            module.register_forward_hook(lambda _m, _i, out, outputs=outputs: outputs.append(out))
    with torch.no_grad():
        for number in range(num_segments):
            start = len(tokens) * number // num_segments
            end = len(tokens) * (number + 1) // num_segments
            reference(torch.tensor([tokens[start:end]]))
    layers = []
    for outputs in recorded.values():
        # gpt_neox projects queries, keys and values of a head next to each other.
        heads = [out[0].reshape(out.shape[1], num_heads, -1)[..., :head_dim] for out in outputs]
        layers.append(torch.cat(heads).numpy())
    return np.stack(layers)


def expected_means(
    queries: np.ndarray, rotary_dim: int, interleaved: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``E[q_f]``, ``E|q_f|`` [layers, heads, F] and ``E[q_d]`` of the unrotated dims."""
    num_frequencies = rotary_dim // 2
    centre, magnitude = [], []
    for frequency in range(num_frequencies):
        if interleaved:
            x, y = queries[..., 2 * frequency], queries[..., 2 * frequency + 1]
        else:
            x, y = queries[..., frequency], queries[..., frequency + num_frequencies]
        centre.append(x.mean(axis=1) + 1j * y.mean(axis=1))
        magnitude.append(np.sqrt(x * x + y * y).mean(axis=1))
    unrotated = queries[..., rotary_dim:].mean(axis=1)
    return np.stack(centre, axis=-1), np.stack(magnitude, axis=-1), unrotated


def largest_differences(family: str, model: Path, made: Statistics) -> dict[str, float]:
    fingerprint = made.fingerprint
    queries = transformers_queries(family, model, fingerprint.num_heads, fingerprint.head_dim)
    assert queries.shape[1] == int(made.provenance["tokens_seen"])
    rotary_dim = fingerprint.rotary_dims[0]
    centre, magnitude, unrotated = expected_means(queries, rotary_dim, fingerprint.interleaved)
    return {
        "centre": float(np.abs(made.centre().numpy() - centre).max()),
        "magnitude": float(np.abs(made.magnitude.numpy() - magnitude).max()),
        "unrotated": float(
            np.abs(made.unrotated_mean.numpy()[..., rotary_dim:] - unrotated).max(initial=0.0)
        ),
    }


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float32") for family in QUERY_MODULES), ("qwen3", "bfloat16")],
)
def test_calibration_equals_transformers_in_float64(
    family: str, dtype: str, tmp_path: Path
) -> None:
    model = write_family(family, tmp_path / "model")
    made = calibrated(model, tmp_path, dtype=dtype)
    fingerprint = made.fingerprint
    assert fingerprint.interleaved == (family == "gptj")
    partly = {dim < fingerprint.head_dim for dim in fingerprint.rotary_dims}
    assert partly == {family in PARTLY_ROTATED}
    differences = largest_differences(family, model, made)
    assert max(differences.values()) < TOLERANCE[dtype], differences
    assert 0.3 < float(made.concentration().mean()) < 1.0


def test_every_rotating_family_of_the_support_models_is_calibrated() -> None:
    assert set(QUERY_MODULES) == {"qwen3", *CONFIGS} - {"bloom"}, "bloom has no rotary embedding"
