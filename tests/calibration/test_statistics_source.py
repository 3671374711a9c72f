"""Which statistics a start finds, before it would make any."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_statistics import MODEL, some_statistics

from triattention_vllm.config import Settings
from triattention_vllm.engine import cache_folder
from triattention_vllm.engine.statistics_source import calibration_text, find_statistics
from triattention_vllm.errors import StatisticsError
from triattention_vllm.texts import shipped_text


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_from(settings: Settings) -> None:
    """Leave statistics in the cache folder, as a start with these settings does."""
    provenance = {"tokens_seen": "9000", "text": calibration_text(settings)[1]}
    cache_folder.keep(replace(some_statistics(), provenance=provenance))


def test_nothing_is_found_at_the_first_start() -> None:
    assert find_statistics(Settings(), MODEL) is None


def test_the_next_start_finds_what_the_first_one_made() -> None:
    made_from(Settings())
    found = find_statistics(Settings(), MODEL)
    assert found is not None
    assert found[1] == str(cache_folder.cached_file(MODEL))
    assert found[0].provenance["tokens_seen"] == "9000"


def test_another_text_makes_other_statistics(tmp_path: Path) -> None:
    made_from(Settings())
    own = tmp_path / "own.txt"
    own.write_text("one", encoding="utf-8")
    settings = Settings(calibration_text=str(own))
    assert find_statistics(settings, MODEL) is None
    made_from(settings)
    assert find_statistics(settings, MODEL) is not None
    own.write_text("two", encoding="utf-8")
    assert find_statistics(settings, MODEL) is None


def test_a_file_that_is_named_comes_before_the_cache_folder(tmp_path: Path) -> None:
    made_from(Settings())
    path = tmp_path / "given.safetensors"
    some_statistics().save(path)
    found = find_statistics(Settings(statistics=str(path)), MODEL)
    assert found is not None
    assert found[1] == str(path)
    assert found[0].provenance["text"] == "a text"


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pt"])
def test_a_file_that_is_missing_is_found_out_at_the_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=name):
        find_statistics(Settings(statistics=str(tmp_path / name)), MODEL)


def test_a_file_of_another_model_names_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    some_statistics(replace(MODEL, layer_indices=(0, 2))).save(path)
    with pytest.raises(StatisticsError, match="belong to another model"):
        find_statistics(Settings(statistics=str(path)), MODEL)


def test_the_shipped_text_is_read_unless_another_is_named(tmp_path: Path) -> None:
    text, name = calibration_text(Settings())
    assert text == shipped_text()
    assert name.startswith("the shipped text (sha256 ")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StatisticsError, match="UTF-8"):
        calibration_text(Settings(calibration_text=str(binary)))
