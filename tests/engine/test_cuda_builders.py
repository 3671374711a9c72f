"""vLLM's GPU metadata builders, with ours in front, look past the null head."""

from pathlib import Path
from typing import Any

import pytest
from engine_runs import ModelFolder
from fresh_script import ON_TRITONS_INTERPRETER, answer_of

from triattention_vllm.engine.differences import LINE

# Through 0.31 vLLM's builder launches a Triton kernel of its own, which its CPU build leaves out.
PLANS_WITHOUT_KERNEL = LINE >= (0, 32)
BACKENDS = ["TRITON_ATTN", "FLASH_ATTN", "ROCM_ATTN", "ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_FA"]
# FLASH_ATTN alone stands for FlashAttention 3, which the host schedules.
EVERY_BUILDER = [*BACKENDS, "FLASH_ATTN 2", "FLASH_ATTN 4"]


@pytest.fixture(scope="module")
def built(model_folder: ModelFolder) -> dict[str, dict[str, Any]]:
    """What vLLM's own builders made, by backend; from a process with interpreted Triton."""
    script = Path(__file__).with_name("cuda_builders_script.py")
    names = [*BACKENDS, *(["FLASHINFER"] if PLANS_WITHOUT_KERNEL else [])]
    results: dict[str, dict[str, Any]] = answer_of(
        script, str(model_folder("qwen3")), *names, environment=ON_TRITONS_INTERPRETER
    )
    return results


@pytest.mark.feature("CUDA graphs", "not yet run on a GPU")
@pytest.mark.parametrize("backend", EVERY_BUILDER)
def test_cuda_metadata_is_built_from_shifted_rows(
    backend: str, built: dict[str, dict[str, Any]]
) -> None:
    """Regression: silently nothing under another model runner or under full CUDA graphs."""
    result = built[backend]
    assert result["rows"] == [[5, 6], [7, 8], [9, 10]]
    assert result["seq_lens"] == result["drafted"] == [31, 30, 32, 0]
    assert result["max_seq_len"] == 32
    assert result["slots"] == [0, 1, 2]
    assert result["cudagraph_support_kept"]
    assert not result["goes_around_build"]
    assert not result["fused_drafts"]


@pytest.mark.parametrize("backend", EVERY_BUILDER)
def test_captured_graphs_read_the_memory_that_every_build_writes(
    backend: str, built: dict[str, dict[str, Any]]
) -> None:
    result = built[backend]
    assert result["same_memory"], "a captured graph would read the first step for ever"
    assert result["captured_same_memory"]


@pytest.mark.parametrize("backend", EVERY_BUILDER)
def test_a_build_reads_nothing_from_the_device_and_allocates_what_vllm_does(
    backend: str, built: dict[str, dict[str, Any]]
) -> None:
    """It ran on tensors without memory: whatever reads one raises."""
    assert built[backend]["launches"] == 1
    assert built[backend]["allocations"] == built[backend]["vllms_allocations"]


def test_flash_attention_3_is_scheduled_by_the_shortened_lengths(
    built: dict[str, dict[str, Any]],
) -> None:
    assert built["FLASH_ATTN"]["fa3"][:2] == [[32, True], [32, True]]
    assert built["FLASH_ATTN 2"]["fa3"] == built["FLASH_ATTN 4"]["fa3"] == []


@pytest.fixture(scope="module")
def imported(model_folder: ModelFolder) -> dict[str, bool]:
    """Whether a name was in a new process after its step; see the script."""
    script = Path(__file__).with_name("gpu_imports_script.py")
    benchmarks = {"PYTHONPATH": str(Path(__file__).parents[2] / "benchmarks")}
    results: dict[str, bool] = answer_of(script, str(model_folder("qwen3")), environment=benchmarks)
    return results


def test_a_backend_is_imported_only_where_vllm_chooses_it(imported: dict[str, bool]) -> None:
    """FlashInfer's imports a package that is not there on most machines."""
    assert not imported["flashinfer with the worker"]


def test_a_gpu_process_never_imports_vllms_cpu_worker(imported: dict[str, bool]) -> None:
    """Regression: importing it puts placeholders in the place of torch's CUDA events, streams and
    pinned memory, and no compressed engine on a GPU could have worked.
    """
    assert not imported["placeholders with the configuration"]
    assert not imported["placeholders with everything for a GPU"]
    assert imported["placeholders with the worker of the CPU"]


@pytest.mark.skipif(
    not PLANS_WITHOUT_KERNEL, reason="vLLM's FlashInfer builder needs Triton through 0.31"
)
def test_flashinfer_is_planned_on_the_host_with_exactly_the_devices_lengths(
    built: dict[str, dict[str, Any]],
) -> None:
    wrapper, plan = built["FLASHINFER"]["decode"]
    assert wrapper == "BatchDecodeWithPagedKVCacheWrapper"
    assert plan["indptr"] == [0, 2, 4, 6]
    assert plan["indices"] == [5, 6, 7, 8, 9, 10]
    assert plan["last_page_len"] == [15, 14, 16]
    kinds = dict(built["FLASHINFER"]["mixed"])
    assert kinds["BatchDecodeWithPagedKVCacheWrapper"]["seq_lens"] == [31, 30]
    prefill = kinds["BatchPrefillWithPagedKVCacheWrapper"]
    assert prefill["seq_lens"] == [32, 0]
    assert prefill["qo_indptr"] == [0, 7, 7]
    assert prefill["paged_kv_indptr"] == [4, 6, 6]
    assert prefill["paged_kv_indices"] == [5, 6, 7, 8, 9, 10]
    assert not built["FLASHINFER"]["goes_around_build"]
    assert not built["FLASHINFER"]["fused_drafts"]
    assert built["FLASHINFER"]["cudagraph_support_kept"]
