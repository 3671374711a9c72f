"""The soak in its smallest size: the same traffic, faults and checks for some seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
KINDS_OF_RESULT = {"served", "refused", "aborted"}


def short_soak(output: Path, *flags: str) -> dict[str, Any]:
    """The report of some seconds that ended well."""
    command = [sys.executable, str(SOAK), "--minutes", "0.1", "--output", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    log = output.with_suffix(".log")
    said = log.read_text()[-4000:] if log.exists() else ""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:] + said
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert {"commit", "processor", "engine", "size"} <= set(report["conditions"])
    assert report["conditions"]["engine"]["environment"]["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "16"
    totals = report["totals"]
    assert (totals["lost"], report["losses"], report["exit_code"]) == (0, [], 0)
    assert all(totals[result] > 0 for result in KINDS_OF_RESULT)
    assert report["faults"]["resets_of_the_prefix_cache"] > 0
    for process in ("vllm serve", "VLLM::EngineCore", "VLLM::Worker"):
        (found,) = (found for name, found in report["processes"].items() if process in name)
        # Each of them has PyTorch in memory.
        assert 50 < found["in_use_mib"]["mean"] < found["rss_mib"]["mean"]
        assert found["python_blocks"]["mean"] > 1_000_000
    return report


@pytest.mark.timeout(1800)
def test_a_short_soak_breaks_no_law_and_loses_nothing(tmp_path: Path) -> None:
    report = short_soak(tmp_path / "soak.json")
    scheduler, worker = report["checks"]["scheduler"], report["checks"]["worker"]
    assert scheduler["is_idle"]
    assert scheduler["scheduler"] == "CompressionAsyncScheduler"
    assert scheduler["num_free"] == (6 << 20) // (32 * 1024) - 1
    assert scheduler["preemptions"] > 0
    assert scheduler["rounds"] == report["metrics"]["triattention:rounds_total"] > 0
    assert worker["hashed_blocks"] > 0
    assert worker["steps"] > 0


@pytest.mark.timeout(1800)
def test_the_same_traffic_on_a_stock_server(tmp_path: Path) -> None:
    report = short_soak(tmp_path / "stock.json", "--stock")
    assert "malformed" in report["requests"]
    assert "bad_value" not in report["requests"]
    assert not any("triattention" in name for name in report["metrics"])
    assert report["metrics"]["vllm:num_preemptions_total"] > 0
