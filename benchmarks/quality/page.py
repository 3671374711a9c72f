"""Measure the tables of docs/quality.md, which tables.yaml lists, and write them into the page.

    PYTHONPATH=benchmarks python -m quality.page [--tables NAME ...] [--dfs-file FILE]

Run it in the root of the clone. Rows that benchmarks/results has are not measured again: after a
training, delete its quality_*.json first. Two processes with different tables share two cores well;
everything takes about 75 minutes of each.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import yaml
from quality import run
from quality.problems import calibration_text
from quality.report import figure, summary

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = Path(".cache") / "quality"
FIGURES = ("prompt_kept", "prompt_competes")
FLAGS = ("asynchronous",)
Json = dict[str, Any]


def tables() -> dict[str, list[list[str]]]:
    """Arguments of ``quality.run``, run by run, of each table of tables.yaml."""
    listed = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8"))
    return {
        name: [_words(given) for given in runs]
        for name, runs in listed.items()
        if not name.startswith(".")
    }


def _words(given: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in given.items():
        if name == "variants":
            for variant, settings in value.items():
                words += ["--variant", f"{variant}={json.dumps(settings)}"]
        elif name in FLAGS:
            words += [f"--{name}"] * value
        elif name == "settings":
            words += ["--settings", json.dumps(value)]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


TABLES = tables()


def result_file(name: str) -> Path:
    """Where a table's figures are."""
    return RESULTS / f"quality_{name}.json"


def result_rows(name: str) -> list[Json]:
    """A table's figures."""
    found = json.loads(result_file(name).read_text(encoding="utf-8"))
    rows: list[Json] = found["results"]
    return rows


def with_table(page: str, name: str, table: str) -> str:
    """The page with another table behind ``<!-- name -->``. Raises ValueError without that mark."""
    mark = f"<!-- {name} -->\n"
    written, count = re.subn(re.escape(mark) + r"(?:\|.*\n)*", lambda _: mark + table, page)
    if count != 1:
        raise ValueError(f"the page has {count} places marked {mark.strip()}; there must be one")
    return written


def write_texts() -> None:
    """Other texts for the statistics than the shipped one."""
    shuffled = calibration_text().split()
    Random(1).shuffle(shuffled)
    texts = {
        "short": calibration_text(256, 1),
        "long": calibration_text(1024, 20),
        "needle": calibration_text(1024, 10, ("needle",)),
        "shuffled": " ".join(shuffled) + "\n",
    }
    TEXTS.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (TEXTS / f"{name}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Measure what is missing, then write what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--dfs-file", help="the public searches, without which dfs_file is left")
    arguments = parser.parse_args()
    for name in arguments.tables:
        further = ("--output", str(result_file(name)))
        if name == "texts":
            write_texts()
        if name == "dfs_file":
            if arguments.dfs_file is None:
                continue
            further += ("--dfs-file", arguments.dfs_file)
        for words in TABLES[name]:
            run.measure(run.parse((*words, *further)))
        page = with_table(PAGE.read_text(encoding="utf-8"), name, summary(result_rows(name)))
        PAGE.write_text(page, encoding="utf-8")
        if name in FIGURES:
            figure(result_rows(name), ROOT / "docs" / "images" / f"quality_{name}.png")


if __name__ == "__main__":
    main()
