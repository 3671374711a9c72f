"""The kernel benchmark and the GPU package, as far as they run without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from triattention_vllm import SettingsError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROOT = BENCHMARKS.parent
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


@pytest.fixture
def parts(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("parts")


@pytest.fixture
def stages(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("run")


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


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def site(parts: ModuleType, tmp_path: Path) -> Path:
    """What is left of two small wheels."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(
        wheels / "vllm-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl",
        {
            "vllm/__init__.py": b"",
            "vllm/_C_stable_libtorch.abi3.so": os.urandom(2000),
            "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": b"f" * 3000,
            "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": b"not needed",
            "vllm/third_party/cutlass/matrix.hpp": b"not needed",
            "vllm/kernels/config.json": b"{}",
            "vllm-0.32.0.dist-info/METADATA": b"Name: vllm",
        },
    )
    write_wheel(
        wheels / "small-1.0-py3-none-any.whl",
        {
            "small/part.so": b"s",
            "small-1.0.dist-info/METADATA": b"Name: small",
            "small-1.0.data/scripts/tool": b"not needed",
        },
    )
    root = tmp_path / "site"
    parts.unzip_wheels(wheels.glob("*.whl"), root)
    return root


def test_the_wheels_files_travel_unmodified_in_two_folders(
    parts: ModuleType, site: Path, tmp_path: Path
) -> None:
    names = sorted(parts.files_under(site))
    assert names == [
        "small-1.0.dist-info/METADATA",
        "small/part.so",
        "vllm-0.32.0.dist-info/METADATA",
        "vllm/_C_stable_libtorch.abi3.so",
        "vllm/__init__.py",
        "vllm/kernels/config.json",
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    ]
    first, second = parts.split(names)
    assert first == ["vllm/_C_stable_libtorch.abi3.so"]
    assert sorted(first + second) == names
    for part, own in (("first", first), ("second", second)):
        manifest = parts.pack(site, own, tmp_path / part)
        again = parts.pack(site, own, tmp_path / f"{part}-again")
        assert list(manifest["files"]) == sorted(own)
        assert manifest == again
    there = tmp_path / "there"
    assert parts.unpack([tmp_path / "second"], there) == 6
    assert parts.unpack([tmp_path / "first"], there) == 1
    for name in names:
        assert (there / name).read_bytes() == (site / name).read_bytes()


def test_a_damaged_part_is_refused(parts: ModuleType, site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    parts.pack(site, ["vllm/_C_stable_libtorch.abi3.so"], folder)
    archive = folder / "part.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(ValueError, match="carry it again"):
        parts.unpack([folder], tmp_path / "there")


def test_a_folder_that_is_too_large_is_refused(
    parts: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LIMIT_BYTES", 1000)
    with pytest.raises(ValueError, match="can be carried"):
        parts.pack(site, ["vllm/_C_stable_libtorch.abi3.so"], tmp_path / "part")


def test_a_wheel_of_another_build_is_refused(parts: ModuleType) -> None:
    with pytest.raises(ValueError, match="not the CUDA build"):
        parts.split(["vllm/__init__.py"])


def test_every_package_is_listed_once_with_its_version(parts: ModuleType) -> None:
    listed = parts.requirements_of(parts.PACKAGES)
    assert len(listed) > 30
    assert all(requirement.count("==") == 1 for requirement in listed)
    names = [requirement.split("==")[0] for requirement in listed]
    assert len(set(names)) == len(names)


def stage_of(stages: ModuleType, name: str, code: str, **changes: Any) -> Any:
    def command(folder: Path, seconds: float) -> list[str]:
        return ["-c", code.replace("FOLDER", str(folder))]

    return stages.Stage(
        name, command, **{"share": 1, "result": None, "exits": {0: "passed"}} | changes
    )


def test_a_stage_that_fails_or_hangs_stops_nothing(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the stage that hangs is over once it has written its result, however long that
    took; no other stage is near its limit.
    """

    class TimeOver(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None or "pause()" not in self.args[-1]:
                return super().wait(timeout)
            while not (tmp_path / "kernels.json").exists():
                assert self.poll() is None, "it ended without a result"
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(stages.subprocess, "Popen", TimeOver)
    hangs = (
        "import os, signal; open('FOLDER/part', 'w').write('{\"results\": [1]}'); "
        "os.replace('FOLDER/part', 'FOLDER/kernels.json'); signal.pause()"
    )
    listed = (
        stage_of(stages, "tests", "raise SystemExit(5)"),
        stage_of(stages, "kernels", hangs, result="kernels.json"),
        stage_of(stages, "engine", "import triattention_kernels, gpu.parts; print('here')"),
    )
    summary = stages.run(listed, tmp_path, 60.0, None, {})
    found = summary["stages"]
    assert found["tests"]["status"] == "failed with exit code 5"
    assert found["kernels"]["status"].startswith("stopped after")
    assert found["kernels"]["result"] == {"results": [1]}
    assert found["engine"]["status"] == "passed"
    assert found["engine"]["last_lines"] == ["here"]
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary


def test_a_refusal_of_the_engine_is_shown_in_the_table(stages: ModuleType) -> None:
    start = {"name": "compressed", "way": "eager", "status": "refused", "reason": "no worker for X"}
    stage = {"status": "refused", "seconds": 3.0, "result": {"starts": [start]}}
    assert "compressed (eager) refused: no worker for X" in stages.table_of(
        {"stages": {"engine": stage}}
    )


def test_a_plain_clone_has_the_plugins_entry_point(stages: ModuleType, tmp_path: Path) -> None:
    folder = stages.write_entry_point(tmp_path / "metadata")
    code = (
        "from importlib.metadata import entry_points\n"
        "print(*{e.value for e in entry_points(group='vllm.general_plugins')"
        " if e.name == 'triattention_vllm'})"
    )
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.stdout.strip() == "triattention_vllm.plugin:register", done.stderr
