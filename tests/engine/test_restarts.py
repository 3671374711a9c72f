"""Starts on a cache folder where something is full, broken or changed: a clear error, or right."""

from pathlib import Path
from typing import Any

import pytest
from fresh_process import run_script
from tiny_model import write_tiny_model

SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 128, "head_dim": 32}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, text: str) -> dict[str, Any]:
    """One process that starts a dozen engines."""
    folder = tmp_path_factory.mktemp("restarts")
    model = write_tiny_model(folder / "model", **SHAPE)
    other = write_tiny_model(folder / "other", seed=1, **SHAPE)
    other_text = folder / "other.txt"
    other_text.write_text(" ".join(reversed(Path(text).read_text().split())))
    result: dict[str, Any] = run_script(
        Path(__file__).with_name("restarts_script.py"),
        {
            "model": str(model),
            "other_weights": str(other / "model.safetensors"),
            "cache": str(folder / "cache"),
            "text": text,
            "other_text": str(other_text),
        },
    )
    return result


def test_statistics_that_find_no_room_are_an_error_and_leave_nothing(seen: dict[str, Any]) -> None:
    error = seen["full disk"]["error"]
    assert error.startswith("StatisticsError: statistics could not be written to ")
    assert "File too large" in error
    assert seen["full disk"]["files"] == {}


def test_the_next_start_reads_what_the_first_one_made(seen: dict[str, Any]) -> None:
    assert seen["first"]["source"].startswith("made from text.txt (sha256 ")
    ((name, content),) = seen["first"]["files"].items()
    assert seen["again"]["source"].endswith(name)
    assert seen["again"]["files"] == {name: content}


def test_weights_replaced_while_running_are_told_from_the_same_ones(seen: dict[str, Any]) -> None:
    same, others = seen["again"]["reloads"]
    assert same == []
    (warning,) = others
    assert "the weights have been replaced" in warning


def test_another_calibration_text_makes_the_statistics_anew(seen: dict[str, Any]) -> None:
    changed = seen["another text"]
    assert changed["source"].startswith("made from other.txt (sha256 ")
    assert list(changed["files"]) == list(seen["first"]["files"])
    assert changed["files"] != seen["first"]["files"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncated", "not a whole safetensors file"), ("flipped bit", "the file is damaged")],
)
def test_a_damaged_file_in_the_cache_is_an_error_that_names_it(
    seen: dict[str, Any], damage: str, message: str
) -> None:
    (name,) = seen["first"]["files"]
    assert seen[damage]["error"].startswith("StatisticsError: the file in the cache folder")
    assert message in seen[damage]["error"]
    assert f"{name} and start again" in seen[damage]["error"]


@pytest.mark.parametrize(
    ("when", "error", "message"),
    [
        ("", "UnsupportedError", "computes NaN or infinity in the queries of model.layers.0"),
        (" without statistics", "UnsupportedError", "computes NaN or infinity in the queries"),
        (" while calibrating", "StatisticsError", "queries of layer 0 contain NaN or infinity"),
    ],
)
def test_weights_that_give_nan_queries_are_refused_at_start(
    seen: dict[str, Any], when: str, error: str, message: str
) -> None:
    found = seen[f"NaN queries{when}"]
    assert found["error"].startswith(error)
    assert message in found["error"]
    assert len(found["files"]) == 1


def test_nan_keys_neither_stop_the_engine_nor_cost_a_block(seen: dict[str, Any]) -> None:
    found = seen["NaN keys"]
    assert (found["error"], found["num_tokens"], found["num_held"]) == ("", 300, 0)
    assert found["num_rounds"] == (340 - 1 - 160) // 32 + 1


def test_other_weights_under_the_same_name_have_statistics_of_their_own(
    seen: dict[str, Any],
) -> None:
    found = seen["other weights"]
    assert found["source"].startswith("made from other.txt")
    assert found["files"].keys() > seen["another text"]["files"].keys()
    assert found["num_rounds"] > 0
    error = seen["file of the former weights"]["error"]
    assert error.startswith("StatisticsError: the statistics belong to another model: weights_hash")
