"""The distribution: what a wheel and an sdist hold, and that the wheel works where only it is."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import triattention_vllm

ROOT = Path(__file__).parents[2]
REASONER = {
    f"triattention_vllm/reasoner/{name}"
    for name in (
        "calibration.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "problems.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    )
}
SMOKE = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import triattention_vllm, triattention_kernels
from triattention_vllm.texts import shipped_text
from triattention_vllm.tools.reasoner import MODEL, problems
site = pathlib.Path(sys.argv[1])
assert pathlib.Path(triattention_vllm.__file__).is_relative_to(site)
assert pathlib.Path(triattention_kernels.__file__).is_relative_to(site)
assert len(shipped_text()) > 1000
assert MODEL.is_relative_to(site)
assert len(problems()) == 16
from importlib.metadata import entry_points
plugin, = [e for e in entry_points(group="vllm.general_plugins", name="triattention_vllm")
           if e.dist.locate_file("").samefile(site)]
assert callable(plugin.load())
command, = [e for e in entry_points(group="console_scripts", name="triattention")
            if e.dist.locate_file("").samefile(site)]
sys.argv = ["triattention", "--help"]
command.load()()
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist and wheel, built without a network from a copy of the tracked and new files, links
    among them as links: the small reasoner lies behind one."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name, follow_symlinks=False)
    built = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,) = built.glob("*.tar.gz")
    (wheel,) = built.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_both_packages_and_their_data(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
    sources = {
        str(path.relative_to(folder))
        for folder, package in (
            (ROOT, "triattention_vllm"),
            (ROOT / "kernels", "triattention_kernels"),
        )
        for path in (folder / package).rglob("*")
        if path.suffix in (".py", ".txt", ".html") or path.name == "py.typed"
    }
    assert "triattention_vllm/tools/garage.html" in sources
    assert sources <= names
    assert {name for name in names if "/reasoner/" in name} == REASONER
    assert not [name for name in names if name.split("/")[0] in ("tests", "kernels", "benchmarks")]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_sdist_builds_what_the_repository_builds(distributions: tuple[Path, Path]) -> None:
    """``build`` makes the wheel from the sdist, so what the wheel needs is in there."""
    with tarfile.open(distributions[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "triattention_vllm/plugin.py"} <= names


def test_the_wheel_works_installed_alone(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Into an empty folder that comes before everything else; entry points are the wheel's own."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(distributions[1])], check=True)
    done = subprocess.run(
        [sys.executable, "-I", "-c", SMOKE, str(site)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout


def test_the_version_comes_from_one_place() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert "version" not in project["project"]
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "triattention_vllm.__version__"
    assert metadata.version("triattention-vllm") == triattention_vllm.__version__
    assert f"## {triattention_vllm.__version__} " in (ROOT / "CHANGELOG.md").read_text()
