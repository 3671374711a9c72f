"""``triattention plan``: known models, the known case, and what a user gets wrong."""

import json
import sys
from pathlib import Path

import pytest
from held_blocks import held_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from triattention_vllm.method.policy import Policy
from triattention_vllm.tools.main import main
from triattention_vllm.tools.model_shape import ModelShape, read_model, stages
from triattention_vllm.tools.pool import (
    Deployment,
    Group,
    group_layers,
    lay_out,
    request_blocks,
)

CONFIGS = Path(__file__).parent / "configs"
GIB = 1 << 30


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """The JSON of a plan."""
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def model_of(name: str) -> ModelShape:
    return read_model(str(CONFIGS / f"{name}.json"))


@pytest.mark.parametrize(
    ("name", "billions", "num_full", "num_layers"),
    [
        ("qwen3-32b", 32.76, 64, 64),
        ("llama-3.1-8b", 8.03, 32, 32),
        ("gemma-3-27b", 27.43, 10, 62),
        ("gpt-oss-20b", 20.91, 12, 24),
        ("qwen3-30b-a3b", 30.53, 48, 48),
        ("qwen3-next-80b", 79.67, 12, 48),
    ],
)
def test_parameters_and_layers_are_those_of_the_published_models(
    name: str, billions: float, num_full: int, num_layers: int
) -> None:
    model = model_of(name)
    assert round(model.num_parameters / 1e9, 2) == billions
    assert (model.num_full_layers, model.num_layers) == (num_full, num_layers)


@pytest.mark.parametrize(
    ("name", "weights_dtype", "gib"),
    [
        # Sizes of the published checkpoints: their safetensors files together.
        ("qwen3-32b", "bfloat16", 65.53e9 / GIB),
        ("qwen3-32b", "awq", 19.33e9 / GIB),
        ("gpt-oss-20b", "mxfp4", 13.76e9 / GIB),
        ("llama-3.1-8b", "bfloat16", 16.06e9 / GIB),
    ],
)
def test_counted_weights_are_as_large_as_the_published_files(
    name: str, weights_dtype: str, gib: float
) -> None:
    layout = lay_out(model_of(name), Deployment(1, 1, weights_dtype, "bfloat16", 2, 16))
    assert layout.weights[0] / GIB == pytest.approx(gib, rel=0.005)


def test_qwen3_32b_in_4_bits_on_24_gib_ends_at_24k_tokens_and_goes_on_with_a_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Assumptions: every weight in 4 bits, vLLM's default share of 0.92, 1 GiB of reserve."""
    found = plan(
        capsys,
        str(CONFIGS / "qwen3-32b.json"),
        *("--gpu-memory", "24", "--weights-dtype", "4bit", "--budget", "3072"),
        *("--length", "32768", "40960"),
    )
    assert found["kv_bytes_per_token"] == 256 * 1024
    assert found["wall_tokens"] == 23824
    assert found["longest_compressed"] == 40960
    assert [row["full_requests"] for row in found["fits"]] == [0, 0]  # type: ignore[attr-defined]
    assert [row["compressed_requests"] for row in found["fits"]] == [7, 7]  # type: ignore[attr-defined]


def test_with_awq_the_same_card_ends_earlier(capsys: pytest.CaptureFixture[str]) -> None:
    """Embedding and output head stay in 16 bits there, and groups have scales."""
    arguments = ("--gpu-memory", "24", "--weights-dtype", "awq", "--budget", "3072")
    found = plan(capsys, str(CONFIGS / "qwen3-32b.json"), *arguments)
    assert found["wall_tokens"] == 12592
    assert found["longest_compressed"] == 40960


def test_a_window_model_by_hand() -> None:
    """gpt-oss-20b: 12 full layers and 12 of a window of 128; two groups of 12 layers."""
    layout = lay_out(model_of("gpt-oss-20b"), Deployment(1, 1, "mxfp4", "bfloat16", 2, 16))
    assert [len(group.layer_indices) for group in layout.groups] == [12, 12]
    assert layout.block_bytes == (12 * 2 * 8 * 64 * 2 * 16,)
    # 1000 tokens: 63 blocks in the full group, and the window's 8 with one that it begins in.
    assert request_blocks(layout, 1000, None) == 63 + 9


def test_a_linear_attention_state_makes_blocks_larger() -> None:
    """Qwen3-Next: a state of 1,097,728 bytes; 2048 bytes per token; blocks of 16 tokens."""
    layout = lay_out(model_of("qwen3-next-80b"), Deployment(1, 1, "awq", "bfloat16", 2, 16))
    assert layout.block_size == 544
    assert len(layout.groups) == 4
    assert request_blocks(layout, 5440, None) == 10 + 3


def test_tensor_and_pipeline_parallel_divide_weights_and_blocks() -> None:
    model = model_of("qwen3-32b")
    alone = lay_out(model, Deployment(1, 1, "bfloat16", "bfloat16", 2, 16))
    tensor = lay_out(model, Deployment(4, 1, "bfloat16", "bfloat16", 2, 16))
    pipeline = lay_out(model, Deployment(1, 2, "bfloat16", "bfloat16", 2, 16))
    many = lay_out(model, Deployment(16, 1, "bfloat16", "bfloat16", 2, 16))
    assert tensor.weights[0] == alone.weights[0] // 4
    assert tensor.block_bytes[0] == alone.block_bytes[0] // 4
    assert sum(pipeline.weights) == alone.weights[0]
    assert pipeline.block_bytes == (alone.block_bytes[0] // 2,) * 2
    # More ranks than KV heads: every rank has a copy of one.
    assert many.block_bytes[0] == alone.block_bytes[0] // 8


def test_fp8_keys_and_values_take_half(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(CONFIGS / "llama-3.1-8b.json"), "--gpu-memory", "24")
    half = plan(capsys, *arguments, "--kv-cache-dtype", "fp8")["kv_bytes_per_token"]
    assert half == 32 * 2 * 8 * 128
    assert plan(capsys, *arguments)["kv_bytes_per_token"] == 2 * half  # type: ignore[operator]


@settings(max_examples=60)
@given(
    st.integers(256, 3000),
    st.integers(1, 300),
    st.sampled_from([1, 16, 48, 128]),
    st.integers(1, 9000),
)
def test_no_length_holds_more_than_the_bound_that_fits_are_counted_with(
    budget: int, interval: int, block_size: int, num_tokens: int
) -> None:
    """The two ways of counting agree: round by round, and the bound."""
    policy = Policy(budget, interval, 0, 16, "sinks", block_size)
    if policy.min_survivors() <= 0:
        return
    bound = policy.max_cached_tokens(1)
    assert bound is not None
    assert held_blocks(policy, 16, num_tokens) <= -(-bound // block_size)


def test_layers_are_dealt_out_as_in_the_pipeline_of_vllm() -> None:
    assert [len(own) for own in stages(10, 3)] == [3, 4, 3]
    assert [len(own) for own in stages(11, 3)] == [4, 4, 3]
    assert group_layers([None, 8, 8]) == (Group(None, (0,)), Group(8, (1,)), Group(8, (2,)))


def test_the_weights_files_beside_a_configuration_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-8b.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"0" * 5_000_000)
    found = plan(capsys, str(tmp_path), "--gpu-memory", "24")
    assert (found["weights_from"], found["weights_bytes"]) == ("files", 5_000_000)


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.png"
    arguments = ["plan", str(CONFIGS / "qwen3-32b.json"), "--gpu-memory", "80", "--plot", str(file)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "80 GiB x 0.92 - 61.0 GiB of weights (bfloat16) - 1 GiB reserve" in shown
    assert "\x1b" not in shown
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "gptj"}', "num_key_value_heads is None in the configuration of GPTJ"),
        ('{"model_type": "deepseek_v3"}', "has multi-head latent attention"),
        ('{"model_type": "jamba"}', "state-space layers (mamba_d_state)"),
        ('{"model_type": "recurrent_gemma"}', "has recurrent layers (layers_block_type)"),
        ('{"model_type": "t5"}', "has an encoder"),
        ('{"model_type": "mistral", "sliding_window": 64}', "no full-attention layer"),
        ("not JSON", "is not a model that transformers can read"),
        ('{"hidden_size": 4}', "is not a model that transformers can read"),
    ],
)
def test_a_configuration_that_cannot_be_counted_is_refused_in_one_sentence(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(config)
    assert main(["plan", str(file), "--gpu-memory", "24"]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Neither --gpu-memory nor --kv-cache-memory-bytes is given"),
        (["--gpu-memory", "24"], "nothing is left for the KV cache"),
        (["--gpu-memory", "-3"], "--gpu-memory is -3, allowed is a number above 0"),
        (["--gpu-memory", "80", "--gpu-memory-utilization", "92"], "a share above 0"),
        (["--gpu-memory", "80", "-tp", "3"], "8 KV heads cannot be split over 3"),
        (["--gpu-memory", "80", "-pp", "65"], "65 pipeline stages for 64 layers"),
        (["--gpu-memory", "80", "--budget", "100"], "budget 100 is below window"),
        (["--gpu-memory", "80", "--plot", "/no/such/folder/x.png"], "cannot be written"),
        (["--gpu-memory", "80", "--length", "0"], "allowed is 1 token or more"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(CONFIGS / "qwen3-32b.json"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_code_that_a_model_brings_along_is_neither_run_nor_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    assert main(["plan", str(tmp_path), "--gpu-memory", "24"]) == 1
    shown = capsys.readouterr()
    assert "contains custom code" in shown.err
    assert shown.out == ""
    assert not (tmp_path / "was-run").exists()


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gone/config.json", "--gpu-memory", "24"]) == 1
    assert "gone/config.json does not exist" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_what_brings_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", str(CONFIGS / "qwen3-32b.json"), "--gpu-memory", "24"]) == 1
    shown = capsys.readouterr().err
    assert "needs transformers, which is not installed" in shown
    assert "in the clone of triattention-vllm: pip install -e '.[cpu]'" in shown
