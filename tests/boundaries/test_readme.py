"""The README shows what the code and the result files say."""

import importlib
import json
import sys
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
from feature_table import NOTES, STATUSES, TESTS, Proof, markdown_table, proofs, with_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SIDES = ("full", "compressed")
sys.path.append(str(ROOT / "benchmarks"))


def report_of(name: str) -> Any:
    """A file of benchmarks/results."""
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def benchmark(name: str) -> Any:
    """A script of benchmarks/ as a module."""
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("script", "result", "document"),
    [
        ("engine", "engine_cpu.json", "README.md"),
        ("multi_turn", "multi_turn.json", "docs/features.md"),
        ("needle", "needle.json", "docs/features.md"),
    ],
)
def test_the_figures_of_a_benchmark_are_those_of_its_result_file(
    script: str, result: str, document: str
) -> None:
    """And beside them stand the commit and the lengths that they were measured with."""
    report, text = report_of(result), (ROOT / document).read_text()
    assert benchmark(script).markdown_table(report) in text
    assert benchmark("engine").measured_at(report) in " ".join(text.split())


def test_what_rounds_took_without_redundancy_is_that_of_the_result_file() -> None:
    results = report_of("engine_cpu.json")["results"]
    several = [result for result in results if result["num_requests"] == 4]
    shares = {
        side: [100 * result[side]["rounds_share_of_decode"] for result in several]
        for side in ("compressed", "without_redundancy")
    }
    without = shares["without_redundancy"]
    assert f"they take {floor(min(without))} to {ceil(max(without))} %" in README
    assert "most of it for redundancy" in README
    assert max(without) < min(shares["compressed"]) / 2


def test_where_the_readme_says_that_compression_loses_it_does() -> None:
    engine, results = benchmark("engine"), report_of("engine_cpu.json")["results"]
    just_above = [result for result in results if result["context"] == 2048]
    assert len(just_above) == 2
    assert "with 2k tokens the step and its rounds take longer than full attention's" in README
    for result in just_above:
        full, ours = (engine.step_with_rounds(result[side]) for side in SIDES)
        assert full < ours


def test_what_the_readme_says_of_accuracy_is_that_of_the_result_files() -> None:
    def right(file: str, task: str, method: str, budget: int | None, variant: str = "") -> str:
        asked = [method, budget, variant, task, 1024, 40]
        names = ("method", "budget", "variant", "task", "length", "num_problems")
        counts = [
            str(round(row["exact"] * row["num_problems"]))
            for row in report_of(f"quality_{file}.json")["results"]
            if [row[name] for name in names] == asked
        ]
        return counts[0] if counts else ""

    names = {
        "needle": "single facts",
        "recall": "updates",
        "add": "sums",
        "machine": "traces of programs",
        "dfs": "searches of graphs",
    }
    rows = []
    for task, name in names.items():
        cells = (
            right("prompt_competes", task, "full", None),
            right("prompt_kept", task, "triattention", 256),
            right("prompt_competes", task, "triattention", 512),
            right("variants_competes", task, "triattention", 512, "prompt protected"),
        )
        assert cells[0]
        assert cells[2]
        rows.append(f"| {name} | {' | '.join(cells)} |\n".replace("|  |", "| |"))
    assert "".join(rows) in README


def test_the_commands_that_the_readme_shows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "bench", "test-gpu"):
        assert f"make {target}" in README
        assert f"\n{target}:" in makefile


def test_every_variable_that_the_readme_names_is_known() -> None:
    from triattention_vllm.config import descriptions, environment_name
    from triattention_vllm.environment import ALLOW_UNTESTED_VLLM, CACHE, ENABLE

    known = {environment_name(name) for name in descriptions()} | {
        ALLOW_UNTESTED_VLLM,
        CACHE,
        ENABLE,
    }
    words = README.replace("`", " ").replace("=", " ").replace("|", " ").split()
    named = {word.strip(".,:;()") for word in words if word.startswith("TRIATTENTION_")}
    assert len(named) > 8
    assert named <= known


def test_the_table_of_features_is_what_the_tests_carry() -> None:
    table = markdown_table(list(proofs()))
    assert with_table(README, table) == README, "run: python tests/support/feature_table.py"


def test_every_row_that_may_stand_in_the_table_has_a_test() -> None:
    proved = {proof.feature for proof in proofs()}
    assert set(NOTES) - proved == set()


@pytest.mark.parametrize(
    ("feature", "status", "reason"),
    [
        ("A feature nobody knows", STATUSES[0], "is not known"),
        ("Prefix caching", "probably", "is not known"),
        ("Prefix caching", STATUSES[1], "tests disagree about"),
    ],
)
def test_a_marker_that_is_wrong_is_named(feature: str, status: str, reason: str) -> None:
    wrong = Proof(feature, status, TESTS / "test_x.py", "test_y")
    with pytest.raises(ValueError, match=reason):
        markdown_table([*proofs(), wrong])
