"""The cache folder keeps statistics, and never covers up a file that is wrong."""

import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_statistics import MODEL, some_statistics

from triattention_vllm.engine import cache_folder
from triattention_vllm.errors import StatisticsError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TRIATTENTION_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"TRIATTENTION_CACHE": "", "XDG_CACHE_HOME": "/b"}, Path("/b/triattention")),
        ({}, Path.home() / ".cache" / "triattention"),
    ],
)
def test_the_most_specific_variable_chooses_the_folder(
    environment: dict[str, str], expected: Path
) -> None:
    assert cache_folder.cache_folder(environment) == expected


def test_statistics_that_were_kept_are_found_again(folder: Path) -> None:
    assert cache_folder.load_or_none(MODEL) is None
    made = some_statistics()
    path = cache_folder.keep(made)
    assert path.parent == folder
    assert path.name.startswith("Tiny_ForCausalLM-")
    found = cache_folder.load_or_none(MODEL)
    assert found is not None
    assert torch.equal(found.centre(), made.centre())
    assert found.provenance == made.provenance
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_another_model_has_another_file() -> None:
    cache_folder.keep(some_statistics())
    assert cache_folder.load_or_none(replace(MODEL, weights_hash="c")) is None


@pytest.mark.parametrize("keep_bytes", [0, 40, -7])
def test_a_damaged_file_is_an_error_that_says_what_to_delete(keep_bytes: int) -> None:
    path = cache_folder.keep(some_statistics())
    damaged = path.read_bytes()[:keep_bytes]
    path.write_bytes(damaged)
    with pytest.raises(StatisticsError, match=f"Delete {path} and start again"):
        cache_folder.load_or_none(MODEL)
    assert path.read_bytes() == damaged


def test_a_foreign_file_in_the_place_is_an_error() -> None:
    path = cache_folder.keep(some_statistics())
    some_statistics(replace(MODEL, weights_hash="of another model")).save(path)
    with pytest.raises(StatisticsError, match=r"weights_hash.*Delete"):
        cache_folder.load_or_none(MODEL)


def test_a_folder_that_cannot_be_written_is_reported_before_calibrating(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    with pytest.raises(StatisticsError, match="set TRIATTENTION_CACHE to a folder"):
        cache_folder.check_writable()
    with pytest.raises(StatisticsError, match="set TRIATTENTION_CACHE to a folder"):
        cache_folder.keep(some_statistics())


def test_a_read_only_folder_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", "/proc/self")  # where root may not write either
    with pytest.raises(StatisticsError, match="cannot be kept in the cache folder /proc/self"):
        cache_folder.check_writable()
