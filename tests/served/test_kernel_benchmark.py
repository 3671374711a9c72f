"""The kernel benchmark, as far as it runs without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from triattention_vllm import SettingsError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPERATIONS = {
    *("score", "select", "select_redundancy", "compact", "round"),
    *("fill_holes", "compact_fill_holes", "shift"),
}
Json = dict[str, Any]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py, by its path: by name, the folder of the packages may come first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("kernel_benchmark", BENCHMARKS / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_run(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--tiny", "--cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_a_tiny_run_checks_triton_and_reports_the_conditions_of_its_figures(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    done = tiny_run("--output", str(output), "--commit", "abc", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    conditions = {"date", "commit", "device", "python", "torch", "threads"}
    assert conditions <= set(report["conditions"])
    assert report["conditions"]["commit"] == "abc"
    assert report["copy_bytes_per_s"] > 0
    assert [result["num_requests"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        assert set(result["checks"]) == {"product", "plain", "triton"}
        assert {check["name"] for check in result["checks"]["triton"]} == OPERATIONS - {"round"}
        assert result["shape"]["num_destination_blocks"] == 8
        assert set(result["operations"]) == OPERATIONS
        for name, own in result["operations"].items():
            assert own["product"]["device_us"]["median"] > 0
            assert own["product"]["wall_us"]["count"] >= 1
            assert own["bytes"] > 0
            assert own["copy_share"] > 0
            assert ("speedup_over_plain" in own) == (
                name in {"score", "select", "select_redundancy", "compact", "round"}
            )
    table = done.stdout.splitlines()
    assert sum(line.startswith("tiny ") for line in table) == 2 * len(OPERATIONS)
    assert not any("NO SPEED-UP" in line for line in table)


def run_with(kernels: ModuleType, output: Path, **wrong: Any) -> tuple[Json, Json]:
    """The report of one request whose product has other operations, and its operations."""
    sides = kernels.default_sides("cpu")
    sides = replace(sides, product=replace(sides.product, **wrong))
    size = replace(kernels.TINY, num_requests=(2,), num_turns=1)
    report = kernels.run(size, output, "cpu", sides, seconds=100.0)
    return report, report["results"][0]["operations"]


def test_a_wrong_selection_suppresses_its_speed_up_and_the_rounds(
    kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kernels.default_sides("cpu").product.select_redundancy

    def the_first_tokens(requests: Any, scores: Tensor) -> Tensor:
        kept = right(requests, scores)
        return torch.arange(kept.shape[-1]).expand_as(kept)

    wrong = {"select_redundancy": the_first_tokens}
    report, operations = run_with(kernels, tmp_path / "out.json", **wrong)
    for name in ("select_redundancy", "round"):
        assert operations[name]["refused"] == "results of select_redundancy are wrong"
        assert not any(key.startswith("speedup") for key in operations[name])
        assert "copy_share" not in operations[name]
    for name in ("score", "select", "compact", "fill_holes"):
        assert "refused" not in operations[name]
    assert "speedup_over_plain" in operations["compact"]
    assert len(kernels.failures(report)) == 1
    table = capsys.readouterr().out
    assert table.count("NO SPEED-UP: results of select_redundancy are wrong") == 2


def test_a_selection_without_its_redundancy_is_found(kernels: ModuleType, tmp_path: Path) -> None:
    plain = kernels.default_sides("cpu").product.select
    _, operations = run_with(kernels, tmp_path / "out.json", select_redundancy=plain)
    assert operations["round"]["refused"] == "results of select_redundancy are wrong"


def test_a_token_that_is_not_moved_suppresses_the_speed_up(
    kernels: ModuleType, tmp_path: Path
) -> None:
    right = kernels.default_sides("cpu").product.compact

    def all_but_one_value(requests: Any, kept: Tensor) -> None:
        own = kept[-1, -1, -1]
        moved = int((own != torch.arange(len(own))).nonzero()[-1])
        block_idx, slot = divmod(moved, requests.kv.block_size)
        block = requests.batch.destination_blocks[-1, block_idx]
        before = requests.kv.values[-1, block, -1, slot, 0, -1, 0].clone()
        right(requests, kept)
        requests.kv.values[-1, block, -1, slot, 0, -1, 0] = before

    _, operations = run_with(kernels, tmp_path / "out.json", compact=all_but_one_value)
    assert operations["compact"]["refused"] == "results of compact are wrong"
    assert "refused" in operations["round"]
    assert "refused" in operations["compact_fill_holes"]
    assert "refused" not in operations["select"]


def test_scores_in_half_precision_suppress_the_speed_up(
    kernels: ModuleType, tmp_path: Path
) -> None:
    right = kernels.default_sides("cpu").product.score
    _, operations = run_with(
        kernels, tmp_path / "out.json", score=lambda requests: right(requests).bfloat16().float()
    )
    assert operations["score"]["refused"] == "results of score are wrong"
    assert "speedup_over_plain" not in operations["score"]
    assert "speedup_over_plain" in operations["select"]


def test_wrong_rows_and_holes_are_found(kernels: ModuleType, tmp_path: Path) -> None:
    report, operations = run_with(
        kernels,
        tmp_path / "out.json",
        shift=lambda requests: None,
        fill_holes=lambda requests, kept: kept,
    )
    assert "refused" in operations["shift"]
    assert "refused" in operations["fill_holes"]
    failures = kernels.failures(report)
    assert [failure.split(": ", 1)[1] for failure in failures] == [
        "product fill_holes: differs from torch",
        "product shift: differs from torch",
    ]


def test_a_wrong_alternative_is_not_compared_with(kernels: ModuleType, tmp_path: Path) -> None:
    sides = kernels.default_sides("cpu")
    lazy = replace(sides.plain, compact=lambda requests, kept: None)
    size = replace(kernels.TINY, num_requests=(1,), num_turns=1)
    output = tmp_path / "out.json"
    report = kernels.run(size, output, "cpu", replace(sides, plain=lazy), seconds=100.0)
    operations = report["results"][0]["operations"]
    assert "speedup_over_plain" not in operations["compact"]
    assert "speedup_over_plain" not in operations["round"]
    assert "speedup_over_plain" in operations["score"]


def test_shapes_without_time_are_listed(kernels: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    report = kernels.run(kernels.TINY, output, "cpu", kernels.default_sides("cpu"), seconds=-1.0)
    assert report["results"] == []
    assert [shape["num_requests"] for shape in report["skipped"]] == [1, 2]
    assert all("--seconds" in shape["reason"] for shape in report["skipped"])
    assert json.loads(output.read_text(encoding="utf-8"))["skipped"] == report["skipped"]


def test_a_shape_that_would_not_end_in_time_is_not_begun(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request takes 5 s here, so 10 are left for the fourth shape. It is nearest to the third."""
    now = [0.0]

    def measured(model: Any, budget: int, num_requests: int, *_: Any) -> Json:
        now[0] += 5.0 * num_requests
        return {"num_requests": num_requests, "copy_bytes_per_s": 1.0, "operations": {}, **shape}

    shape = {"model": "tiny", "budget": 192}
    monkeypatch.setattr(kernels, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(kernels, "measure", measured)
    size = replace(kernels.TINY, num_requests=(1, 2, 4, 3, 1))
    sides = kernels.default_sides("cpu")
    report = kernels.run(size, tmp_path / "out.json", "cpu", sides, seconds=45.0)
    assert [result["num_requests"] for result in report["results"]] == [1, 2, 4, 1]
    (skipped,) = report["skipped"]
    assert skipped["num_requests"] == 3
    assert "10 s are left, it may need 20" in skipped["reason"]


def test_a_round_is_that_of_the_default_settings(kernels: ModuleType) -> None:
    """Budget 2048, interval 128, window 512, 16 sinks: tokens 16 to 1663, and 128 of them go."""
    shape = kernels.round_shape(kernels.MODELS[0], 2048, 1)
    assert (shape.num_tokens, shape.num_kept) == (1648, 1648 - 128)
    tiny = kernels.round_shape(kernels.TINY.models[0], 192, 2)
    requests, _ = kernels.make_request_sets(tiny, 192, torch.float32, 2, "cpu")
    assert requests.num_cached_blocks == (192 + 128) // 16


def test_a_budget_that_a_server_refuses_is_refused(kernels: ModuleType) -> None:
    with pytest.raises(SettingsError, match="at least 170 tokens"):
        kernels.round_shape(kernels.MODELS[0], 169, 1)
    assert kernels.round_shape(kernels.MODELS[0], 170, 1).num_destination_blocks > 0
