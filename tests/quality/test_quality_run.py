"""The quality run in its quick size: the order that must hold, measured in the real engine."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fresh_process import run_fresh
from quality import measure, run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int | None], list[Row]]:
    """Rows by method and budget; 768 tokens and more evict nothing from these problems.

    Full attention by the command line, as a user starts it; the others go into the same file and
    have their engines in forks, where vLLM is imported already.
    """
    output = tmp_path_factory.mktemp("quality") / "quality.json"
    words = ["--output", str(output), "--tasks", "dfs", "--lengths", "768", "--problems", "12"]
    words += ["--budgets", "128", "768", "--settings", '{"protect": "all_prompt"}']
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "quality.run", *words, "--methods", "full"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "subprocess", SimpleNamespace(run=measured_in_a_fork))
        run.measure(run.parse([*words, "--methods", "triattention", "random"]))
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in json.loads(output.read_text(encoding="utf-8"))["results"]:
        found.setdefault((row["method"], row["budget"]), []).append(row)
    return found


def measured_in_a_fork(
    command: Sequence[str], *, env: Mapping[str, str], **how: Any
) -> subprocess.CompletedProcess[str]:
    """``python measure.py JOB RESULT``."""
    _, script, *files = command
    assert script == str(BENCHMARKS / "quality" / "measure.py")
    run_fresh(measure.main, *files, environment=env, timeout=400)
    return subprocess.CompletedProcess(command, 0)


def right_words(rows: list[Row]) -> float:
    return sum(row["right_words"] for row in rows) / len(rows)


def test_the_small_reasoner_solves_its_tasks_under_full_attention(
    rows: dict[tuple[str, int | None], list[Row]],
) -> None:
    for row in rows["full", None]:
        assert row["exact"] >= 0.9
        assert row["rounds"] == 0


def test_full_attention_is_above_triattention_and_triattention_above_chance(
    rows: dict[tuple[str, int | None], list[Row]],
) -> None:
    for method in ("triattention", "random"):
        for row in rows[method, 128]:
            assert row["compressed"] == 1
    full, ours, chance = (
        right_words(rows[how]) for how in (("full", None), ("triattention", 128), ("random", 128))
    )
    assert full >= ours > chance + 0.05


def test_answers_are_the_same_word_for_word_when_nothing_is_evicted(
    rows: dict[tuple[str, int | None], list[Row]],
) -> None:
    for method in ("triattention", "random"):
        for row, full in zip(rows[method, 768], rows["full", None], strict=True):
            assert (row["compressed"], row["answers"]) == (0, full["answers"])
