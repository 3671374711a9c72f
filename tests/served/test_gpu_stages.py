"""The stages of the GPU package, and the folders that carry it, without a GPU."""

import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


@pytest.fixture
def parts(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("parts")


@pytest.fixture
def stages(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("run")


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


def test_an_archive_is_decompressed_once(
    parts: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, read = list(parts.files_under(site)), [0]
    parts.pack(site, names, tmp_path / "part")
    decompress = lzma.LZMADecompressor

    class Counted:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.own = decompress(*arguments, **named)

        def decompress(self, data: bytes, *arguments: Any, **named: Any) -> bytes:
            read[0] += len(data)
            return self.own.decompress(data, *arguments, **named)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.own, name)

    monkeypatch.setattr(lzma, "LZMADecompressor", Counted)
    assert parts.unpack([tmp_path / "part"], tmp_path / "there") == len(names)
    assert read == [(tmp_path / "part" / "part.tar.xz").stat().st_size]


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
            of_a_stage = timeout is not None and timeout > stages.SECONDS_TO_END
            if not of_a_stage or "pause()" not in self.args[-1]:
                return super().wait(timeout)
            while not (tmp_path / "kernels.json").exists():
                assert self.poll() is None, "it ended without a result"
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(stages.subprocess, "Popen", TimeOver)
    hangs = (
        "import os, signal; signal.signal(signal.SIGINT, lambda *_: print('what failed')); "
        "open('FOLDER/part', 'w').write('{\"results\": [1]}'); "
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
    assert found["kernels"]["last_lines"] == ["what failed"], "it may say so before it is killed"
    assert found["kernels"]["result"] == {"results": [1]}
    assert found["engine"]["status"] == "passed"
    assert found["engine"]["last_lines"] == ["here"]
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert {path.name for path in tmp_path.iterdir()} == {
        *("summary.json", "kernels.json", "logs.tar"),
    }
    with tarfile.open(tmp_path / "logs.tar") as logs:
        assert logs.getnames() == ["tests.log", "kernels.log", "engine.log"]


def test_the_table_says_how_every_engine_was_started(
    stages: ModuleType, gpu_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Regression: it ended the run at a start of the stage ``dense``. That stage's own report, of
    an engine that is given a second, in which a fast machine ends it.
    """
    sides, dense = gpu_script("sides"), gpu_script("dense")
    report = dense.run(tmp_path / "dense.json", 1.0, "abc", 8, [sides.COMPILED, sides.EAGER])
    written = json.loads((tmp_path / "dense.json").read_text(encoding="utf-8"))
    assert written["starts"] == report["starts"]
    started = {"name": "full", "way": "eager", "status": "started", "start_s": 40.0}
    refused = {"name": "compressed", "way": "eager", "status": "refused", "reason": "no worker"}
    summary = {
        "dense": {"status": "not run", "seconds": 3.0, "result": report},
        "engine": {"status": "refused", "seconds": 3.0, "result": {"starts": [started, refused]}},
        "tests": {"status": "passed", "seconds": 3.0, "result": None},
        "kernels": {"status": "not begun: no time was left"},
    }
    lines = [line.strip() for line in stages.table_of({"stages": summary}).splitlines()]
    (reason,) = {line.split("failed: ")[1] for line in lines if "(eager) failed: " in line}
    log = "see dense-compressed.log"
    assert reason in (f"it did not end within 1 s, {log}", f"exit code 1, {log}")
    assert f"compressed (eager) failed: {reason}" in lines
    assert any(line.startswith(f"compressed ({sides.COMPILED}) not begun: ") for line in lines)
    assert "full (eager) started" in lines
    assert "compressed (eager) refused: no worker" in lines
    assert len(lines) == 1 + len(summary) + 4


def test_what_is_written_when_a_stage_is_killed_is_what_was_there_before(
    gpu_script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json = gpu_script("decode").write_json
    output = tmp_path / "kernels.json"
    write_json(output, {"results": [1]})

    def half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_json(output, {"results": [1, 2]})
    assert json.loads(output.read_text(encoding="utf-8")) == {"results": [1]}


def test_conditions_are_taken_without_git_and_a_driver(
    gpu_script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: figures of a machine without git were lost where no commit was named."""
    monkeypatch.setenv("PATH", str(tmp_path))
    report = gpu_script("report")
    assert report.conditions("cpu", None)["commit"] is None
    assert report.driver_version() is None


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
