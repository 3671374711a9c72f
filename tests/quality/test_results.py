"""A file of figures that grows over several runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from quality.results import Results
from quality.run import MODEL, SHORT, measure, parse, weights_hash

KEPT = {"settings": {"protect": "all_prompt"}, "asynchronous": False}


def row(method: str, budget: int | None, num_problems: int = 40) -> Any:
    how = {"method": method, "budget": budget, "variant": "", "settings": {}}
    return {**how, "task": "dfs", "length": 64, "num_problems": num_problems}


def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    first = Results(path, KEPT)
    assert not first.has(row("random", 32), "dfs", 64, 40)
    first.add([row("random", 32)])
    first.add([row("random", 16)])
    again = Results(path, KEPT)
    assert again.has(row("random", 32), "dfs", 64, 40)
    assert again.has(row("random", 32), "dfs", 64, 20)
    assert not again.has(row("random", 32), "dfs", 64, 41)
    for other in (row("random", 64), row("h2o", 32), {**row("random", 32), "variant": "x"}):
        assert not again.has(other, "dfs", 64, 40)
    assert not again.has(row("random", 32), "add", 64, 40)
    assert not again.has(row("random", 32), "dfs", 128, 40)


def test_a_variant_of_the_same_name_with_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    Results(path, KEPT).add([row("random", 32)])
    other = {**row("random", 32), "settings": {"window": 8}}
    with pytest.raises(SystemExit, match="give the variant another name"):
        Results(path, KEPT).has(other, "dfs", 64, 40)


def test_a_later_run_adds_rows_in_their_order_and_says_which_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    Results(path, KEPT).add([row("random", 32), row("random", 16)])
    Results(path, KEPT).add([row("triattention", 16), row("full", None), row("random", 16, 80)])
    found = json.loads(path.read_text())
    assert len(found["runs"]) == 2
    assert [(one["method"], one["budget"], one["run"]) for one in found["results"]] == [
        ("full", None, 1),
        ("triattention", 16, 1),
        ("random", 16, 1),
        ("random", 32, 0),
    ]
    assert found["results"][2]["num_problems"] == 80


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    Results(path, KEPT).add([row("random", 32)])
    with pytest.raises(SystemExit, match="was measured with settings .*all_prompt.*another file"):
        Results(path, {**KEPT, "settings": {"protect": "sinks"}})
    assert len(json.loads(path.read_text())["results"]) == 1


def test_rows_of_other_weights_are_refused_before_an_engine_starts(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    arguments = parse(["--methods", "full", "--tasks", "dfs", "--output", str(path)])
    conditions = {"settings": SHORT, "block_size": 32, "asynchronous": False}
    Results(path, {**conditions, "weights": "others"}).add([row("full", None)])
    other = f"weights 'others', and this run has '{weights_hash(MODEL)}'"
    with pytest.raises(SystemExit, match=other):
        measure(arguments)
