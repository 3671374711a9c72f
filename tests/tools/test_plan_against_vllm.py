"""What ``triattention plan`` counts is what vLLM does: its own functions, and a running engine."""

import json
from pathlib import Path

import pytest
import torch
from engine_runs import random_prompt, run_engine
from held_blocks import held_blocks
from tiny_model import write_tiny_model

from triattention_vllm.config import Settings
from triattention_vllm.tools.main import main
from triattention_vllm.tools.model_shape import read_model, stages
from triattention_vllm.tools.pool import group_layers

CONFIGS = Path(__file__).parent / "configs"
POOL_BYTES = 3 << 20
SETTINGS = {"budget": 512, "interval": 50}


def test_a_running_engine_allocates_and_holds_what_the_plan_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step of a long answer, and the pool."""
    model = write_tiny_model(tmp_path / "model", num_layers=3, hidden_size=128, head_dim=32)
    run = run_engine(
        model,
        [random_prompt(40, seed=1)],
        900,
        SETTINGS,
        kv_cache_memory_bytes=POOL_BYTES,
        max_num_batched_tokens=512,
    )
    arguments = ["plan", str(model), "--kv-cache-memory-bytes", "3M", "--block-size", "32"]
    arguments += ["--budget", "512", "--interval", "50", "--length", "939", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run.num_blocks == plan["num_blocks"]
    policy = Settings(**SETTINGS).policy(run.block_size)
    rows = [row for step in run.steps for row in step.values()]
    decoding = [(computed, real) for computed, _, real in rows if computed > 40]
    assert len(decoding) >= 899
    for computed, real in decoding:
        assert real == held_blocks(policy, 40, computed), computed
    assert max(real for _, real in decoding) == plan["fits"][0]["compressed_blocks"]
    assert plan["wall_tokens"] == (run.num_blocks - 1) * run.block_size


@pytest.mark.parametrize("name", ["gemma-3-27b", "gpt-oss-20b", "llama-3.1-8b"])
def test_layers_are_grouped_as_vllm_groups_them(name: str) -> None:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

    windows = read_model(str(CONFIGS / f"{name}.json")).windows
    shape = {"block_size": 16, "num_kv_heads": 8, "head_size": 64, "dtype": torch.bfloat16}
    specs: dict[str, KVCacheSpec] = {
        str(layer_idx): FullAttentionSpec(**shape)
        if window is None
        else SlidingWindowSpec(**shape, sliding_window=window)
        for layer_idx, window in enumerate(windows)
    }
    theirs = _get_kv_cache_groups_uniform_page_size(specs)
    ours = group_layers(windows)
    assert {tuple(map(int, group.layer_names)) for group in theirs} == {
        group.layer_indices for group in ours
    }


def test_pipeline_stages_are_those_of_vllm() -> None:
    from vllm.distributed.utils import get_pp_indices

    for num_layers in (10, 11, 24, 61):
        for num_stages in (1, 2, 3, 4, 7):
            theirs = [get_pp_indices(num_layers, idx, num_stages) for idx in range(num_stages)]
            assert [(own.start, own.stop) for own in stages(num_layers, num_stages)] == theirs


def test_a_linear_attention_state_has_the_size_that_vllm_gives_it() -> None:
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

    conv, recurrent = MambaStateShapeCalculator.gated_delta_net_state_shape(
        1, num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128, conv_kernel_size=4
    )
    state = read_model(str(CONFIGS / "qwen3-next-80b.json")).windows[0]
    assert state.conv_elements == conv[0] * conv[1]  # type: ignore[union-attr]
    assert state.recurrent_elements == recurrent[0] * recurrent[1] * recurrent[2]  # type: ignore[union-attr]
