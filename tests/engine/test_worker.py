"""The order in which a worker does things: at its start, and before a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.worker.gpu_worker import Worker

from triattention_vllm.config import Settings
from triattention_vllm.engine import worker as worker_module
from triattention_vllm.engine.differences import JIT_MONITOR_CAN_WAIT
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.spec import CompressedAttentionSpec
from triattention_vllm.engine.worker import (
    CompressionGPUWorker,
    CompressionWorker,
)


@pytest.mark.skipif(not JIT_MONITOR_CAN_WAIT, reason="vLLM turns it on inside its warm-up")
def test_compilations_are_reported_and_waiting_is_refused_behind_the_rounds_own_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: statistics and warm-up rounds counted as serving, so that a start under
    ``--jit-monitor-mode error`` or ``VLLM_GPU_SYNC_CHECK=error`` failed. vLLM's warm-up is what is
    left out here: it needs a GPU."""
    calls: list[str] = []

    def vllms_warm_up(worker: Worker) -> str:
        worker._maybe_activate_jit_monitor()
        calls.append("vLLM's warm-up")
        return "times"

    @contextmanager
    def allowed() -> Iterator[None]:
        calls.append("may wait")
        yield
        calls.append("may not")

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", vllms_warm_up)
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda _: calls.append("monitor"))
    monkeypatch.setattr(CompressionWorker, "_make_rounds", lambda _: calls.append("statistics"))
    monkeypatch.setattr(worker_module, "gpu_sync_allowed", allowed)
    monkeypatch.setattr(worker_module, "is_first_rank", lambda: False)
    base = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    spec = CompressedAttentionSpec.from_full_attention(base, Settings(), 16)
    worker = CompressionGPUWorker.__new__(CompressionGPUWorker)
    worker.kv_cache_config = SimpleNamespace(
        num_blocks=9, kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    worker.rounds = {0: SimpleNamespace(warm_up=lambda *_: calls.append("rounds"))}
    worker.draft_rounds = {}
    assert worker.compile_or_warm_up_model() == "times"
    assert calls == [
        "vLLM's warm-up",
        *("may wait", "statistics", "may not"),
        *("may wait", "rounds", "may not"),
        "monitor",
    ]


def plan_of(request_id: str, group_id: int, source: list[int], destination: list[int]) -> RoundPlan:
    return RoundPlan(
        request_id=request_id,
        group_id=group_id,
        nominal_boundary=0,
        source_blocks=tuple(source),
        first_candidate=0,
        destination_blocks=tuple(destination),
        row_start=0,
        row_blocks=(),
    )


def test_a_group_reads_a_freed_block_before_a_later_plan_of_any_group_writes_it() -> None:
    """Regression: all plans of a group ran before those of the next, and those of a draft model
    last of all. Request b is given block 12, which request a has freed in group 1."""
    done: list[tuple[str, list[str]]] = []

    def rounds(name: str) -> Any:
        def run(plans: list[RoundPlan]) -> None:
            done.append((name, [plan.request_id for plan in plans]))

        return SimpleNamespace(run=run)

    worker = CompressionWorker.__new__(CompressionWorker)
    worker.rounds = {0: rounds("group 0"), 1: rounds("group 1")}
    worker.draft_rounds = {1: rounds("drafts of group 1")}
    a = [plan_of("a", 0, [1, 2], [1]), plan_of("a", 1, [11, 12], [11])]
    worker._run_rounds([*a, plan_of("b", 0, [3, 4], [3]), plan_of("b", 1, [13, 14], [13])])
    assert done == [(name, ["a", "b"]) for name in ("group 0", "group 1", "drafts of group 1")]
    done.clear()
    worker._run_rounds([*a, plan_of("b", 0, [3, 4], [12]), plan_of("b", 1, [13, 14], [13])])
    assert done == [
        (name, [request])
        for request in ("a", "b")
        for name in ("group 0", "group 1", "drafts of group 1")
    ]
