"""The README shows what the code and the result files say."""

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def engine_benchmark() -> Any:
    """benchmarks/engine.py as a module."""
    spec = importlib.util.spec_from_file_location("engine", ROOT / "benchmarks" / "engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_engine_figures_are_those_of_the_result_file() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "engine_cpu.json").read_text())
    assert engine_benchmark().markdown_table(report) in README


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
