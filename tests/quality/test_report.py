"""The page about quality shows what the result files say."""

import json
from pathlib import Path

import pytest
from quality.report import summary

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("quality_*.json"))


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.stem)
def test_the_tables_of_the_page_are_those_of_the_result_files(result: Path) -> None:
    rows = json.loads(result.read_text(encoding="utf-8"))["results"]
    assert summary(rows) in (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")


def test_a_summary_has_a_line_for_each_method_and_budget() -> None:
    row = {"task": "dfs", "length": 64, "exact": 0.5, "right_words": 0.75, "variant": ""}
    rows = [{**row, "method": "full", "budget": None}, {**row, "method": "random", "budget": 32}]
    assert summary(rows).splitlines() == [
        "| method | budget | dfs 64 |",
        "| --- | --- | --- |",
        "| full |  | 0.50 (0.75) |",
        "| random | 32 | 0.50 (0.75) |",
    ]
