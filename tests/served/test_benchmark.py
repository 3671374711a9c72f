"""The engine benchmark runs, in its smallest size, and reports the conditions of its figures."""

import json
import subprocess
import sys
from pathlib import Path

ENGINE_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "engine.py"


def test_the_benchmark_measures_both_sides_in_one_run(tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    command = [sys.executable, str(ENGINE_BENCHMARK), "--tiny", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"commit", "processor", "engine", "size"} <= set(report["conditions"])
    loads = {(result["context"], result["num_requests"]): result for result in report["results"]}
    assert set(loads) == {(256, 1), (256, 4), (1024, 1), (1024, 4)}
    for result in loads.values():
        assert result["full"]["rounds"] == 0
        assert result["compressed"]["rounds"] > 0
        assert result["without_redundancy"]["rounds"] == result["compressed"]["rounds"]
        assert 0 < result["compressed"]["rounds_share_of_decode"] < 1
    longest = loads[1024, 4]
    assert longest["compressed"]["most_blocks_held"] < longest["full"]["most_blocks_held"] / 3
    assert longest["compressed"]["requests_that_fit"] > 3 * longest["full"]["requests_that_fit"]


def test_turn_two_of_a_chat_is_measured_on_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "multi_turn.json"
    command = [sys.executable, str(ENGINE_BENCHMARK.with_name("multi_turn.py")), "--tiny"]
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"commit", "processor", "engine", "size"} <= set(report["conditions"])
    short, long = report["results"]
    # Nothing was compressed in the first chat, so both sides hit the same.
    assert short["full"]["hit_tokens"] == short["compressed"]["hit_tokens"] == [64, 64]
    for name in ("full", "compressed"):
        assert min(long[name]["hit_tokens"]) >= long["prompt_tokens"]
        assert min(long[name]["first_token_ms"]) > 0


def test_a_needle_is_found_at_every_depth_in_a_hybrid_model_as_in_a_dense_one(
    tmp_path: Path,
) -> None:
    """Prompts of four budgets; the fact that is asked for must have survived their rounds."""
    output = tmp_path / "needle.json"
    command = [sys.executable, str(ENGINE_BENCHMARK.with_name("needle.py")), "--tiny"]
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert (result["method"], result["budget"]) == ("triattention", 128)
    assert result["dense"] == result["hybrid"] == [1.0] * 5
