"""The page about quality shows what the result files say."""

import json
from pathlib import Path

import pytest
from quality.page import PAGE, RESULTS, TABLES, result_file, result_rows, with_table
from quality.report import summary
from quality.run import MODEL, parse, weights_hash


def test_the_page_has_a_table_of_every_result_file() -> None:
    assert {result_file(name) for name in TABLES} == set(RESULTS.glob("quality_*.json"))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_page_are_those_of_the_result_files(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, name, summary(result_rows(name))) == page


@pytest.mark.parametrize(
    ("name", "page"),
    [
        *((name, PAGE) for name in ("earlier_model", "fewer_steps", "other_seed")),
        ("trained_in_parts", PAGE.with_name("training.md")),
    ],
)
def test_the_table_of_another_model_is_that_of_its_file(name: str, page: Path) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    assert with_table(text, name, summary(found["results"])) == text
    assert weights_hash(MODEL) not in {run["weights"] for run in found["runs"]}


@pytest.mark.parametrize("name", TABLES)
def test_the_figures_are_of_the_shipped_model(name: str) -> None:
    runs = json.loads(result_file(name).read_text(encoding="utf-8"))["runs"]
    assert {run["weights"] for run in runs} == {weights_hash(MODEL)}


@pytest.mark.parametrize("name", TABLES)
def test_the_arguments_of_every_table_are_those_of_a_run(name: str) -> None:
    for words in TABLES[name]:
        arguments = parse(words)
        assert len(dict(arguments.variant)) == len(arguments.variant)


def test_a_page_without_the_mark_of_a_table_is_an_error() -> None:
    page = "text\n\n<!-- one -->\n| old |\n\nmore\n"
    assert with_table(page, "one", "| new |\n") == "text\n\n<!-- one -->\n| new |\n\nmore\n"
    for other in ("two", "on"):
        with pytest.raises(ValueError, match=f"0 places marked <!-- {other} -->"):
            with_table(page, other, "| new |\n")


def test_a_summary_has_a_line_for_each_method_and_budget() -> None:
    row = {"task": "dfs", "length": 64, "exact": 0.5, "right_words": 0.75, "variant": ""}
    rows = [{**row, "method": "full", "budget": None}, {**row, "method": "random", "budget": 32}]
    assert summary(rows).splitlines() == [
        "| method | budget | dfs 64 |",
        "| --- | --- | --- |",
        "| full |  | 0.50 (0.75) |",
        "| random | 32 | 0.50 (0.75) |",
    ]
