"""The engines of the GPU package and their pictures, as far as they run without a GPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fresh_process import run_fresh

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROOT = BENCHMARKS.parent
Json = dict[str, Any]


@pytest.fixture
def cases(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("cases")


@pytest.fixture
def sides(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("sides")


@pytest.fixture
def decode(gpu_script: Callable[[str], ModuleType]) -> ModuleType:
    return gpu_script("decode")


def test_the_pools_of_two_engines_fit_beside_their_weights(cases: ModuleType) -> None:
    case = cases.all_cases(2048)["batches"]
    assert case.shape.weight_bytes / 2 == pytest.approx(8.19e9, rel=0.01)  # parameters
    assert case.shape.token_bytes == 147_456
    large = cases.size_for(case, 140 << 30, 384)
    assert cases.needed_tokens(cases.Load(32_768, 8), 384) * 147_456 <= large.pool_bytes
    small = cases.size_for(case, 80 << 30, 384)
    assert small.pool_bytes + case.shape.weight_bytes < 40 << 30
    assert small.max_model_len == 32_768 + 384 + 128
    assert cases.size_for(case, 56 << 30, 384).max_model_len == 8192 + 384 + 128
    with pytest.raises(ValueError, match="give fewer with --layers"):
        cases.size_for(case, 24 << 30, 384)
    fewer = cases.all_cases(2048, 8)["batches"]
    assert cases.size_for(fewer, 40 << 30, 384).pool_bytes > 0


def test_a_case_has_what_its_card_leaves(cases: ModuleType, decode: ModuleType) -> None:
    """Full attention holds one long answer on a card of 24 GiB, and none with a larger model."""
    every = cases.all_cases(3072)
    sizes = {name: cases.size_for(case, 139 << 30, 384) for name, case in every.items()}
    tokens = {name: size.pool_bytes / size.case.shape.token_bytes for name, size in sizes.items()}
    assert 32_784 <= tokens["card24"] < 40_000
    assert 8 * 32_768 <= tokens["card80"] < 13 * 32_768
    assert 3072 + 128 + 2 * 2048 < tokens["large"] < 32_768
    with pytest.raises(ValueError, match="a card of 80 GiB is asked for, and this one has 48"):
        cases.size_for(every["card80"], 48 << 30, 384)
    status, reason = decode.skipped_reason(
        cases.Load(32_768, 8), cases.size_for(every["batches"], 80 << 30, 384), 0.0, 1e9
    )
    assert status == "no room"
    assert "full attention needs" in reason
    wide = sizes["batch128"]
    assert wide.pool_bytes == wide.needed_bytes(cases.Load(4096, 128))


@dataclass
class Starts:
    """In the place of processes: how starts end, by side and way, and how long they had."""

    ends: dict[tuple[str, str], str]
    limits: list[float] = field(default_factory=list)
    now: float = 0.0
    seconds: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def start(
        self, stack: Any, name: str, request: Json, way: str, logs: Path, seconds: float
    ) -> Json:
        self.limits.append(seconds)
        self.now += self.seconds
        status = self.ends.get((name, way), "started")
        found = {"status": status, "way": way}
        return found | ({"side": name, "start_s": self.seconds} if status == "started" else {})


def starts_of(
    sides: ModuleType, names: Sequence[str], ways: Sequence[str], left: float
) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The sides that run, and every start in the order in which it was made."""
    with ExitStack() as stack:
        until = sides.time.monotonic() + left
        requests: dict[str, Json] = {name: {} for name in names}
        found, starts = sides.start_sides(stack, requests, ways, Path(), 0.3 * left, until)
    return list(found), [(start["name"], start["status"], start["way"]) for start in starts]


def test_all_sides_run_in_the_first_way_in_which_none_fails(
    sides: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: full attention ran compiled beside compression that did not."""
    first, second, _ = ways = list(sides.WAYS)
    starts = Starts({("full", first): "failed"})
    monkeypatch.setattr(sides, "start", starts.start)
    names = ("full", "compressed")
    assert starts_of(sides, names, ways, 900.0) == (
        ["full", "compressed"],
        [
            ("full", "failed", first),
            ("full", "started", second),
            ("compressed", "started", second),
        ],
    )
    starts.ends = {("compressed", first): "failed"}
    assert starts_of(sides, names, ways, 900.0) == (
        ["full", "compressed"],
        [
            ("full", "started", first),
            ("compressed", "failed", first),
            ("full", "started", second),
            ("compressed", "started", second),
        ],
    )
    starts.ends = {("compressed", first): "refused"}
    assert starts_of(sides, names, ways, 900.0)[0] == ["full"]
    starts.ends = {("full", first): "no room"}
    running, made = starts_of(sides, names, ways, 900.0)
    assert (running, len(made)) == (["compressed"], 2)
    starts.ends = {("full", way): "failed" for way in ways}
    running, made = starts_of(sides, names, ways, 900.0)
    assert running == ["compressed"]
    assert made[-1] == ("compressed", "started", sides.EAGER)


def test_a_start_has_the_time_of_its_way_and_leaves_an_eager_one_its_own(
    sides: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: an engine had less than a minute to compile, and none was left for the others."""
    starts = Starts({})
    monkeypatch.setattr(sides, "start", starts.start)
    monkeypatch.setattr(sides, "time", starts)
    ways, least = list(sides.WAYS), sides.LEAST_START_S
    assert least[sides.COMPILED] >= 120
    _, made = starts_of(sides, ("full",), ways, 250.0)
    assert made == [("full", "started", sides.COMPILED)]
    assert starts.limits.pop() == pytest.approx(least[sides.COMPILED], abs=1)
    _, made = starts_of(sides, ("full",), ways, 1000.0)
    assert starts.limits.pop() == pytest.approx(300.0, abs=1)
    _, made = starts_of(sides, ("full",), ways, 100.0)
    assert [status for _, status, _ in made] == ["not begun", "not begun", "started"]
    assert starts.limits.pop() == pytest.approx(least[sides.EAGER], abs=1)
    starts.seconds = 140.0
    _, made = starts_of(sides, ("full", "compressed"), ways, 220.0)
    assert made[-1] == ("compressed", "started", sides.COMPILED)
    assert starts.limits.pop() == pytest.approx(80.0, abs=1)
    _, made = starts_of(sides, ("full",), ways, 20.0)
    assert made[-1] == ("full", "started", sides.EAGER)
    assert starts.limits.pop() == pytest.approx(20.0, abs=1)


def test_some_sides_of_a_case_can_be_measured_alone(cases: ModuleType, decode: ModuleType) -> None:
    case = cases.all_cases(2048)["caches"]
    assert list(case.only(["turboquant", "full"]).sides) == ["turboquant", "full"]
    assert case.only(list(case.sides)) == case
    with pytest.raises(ValueError, match="no side int8; it has full, fp8, turboquant, compressed"):
        case.only(["int8"])


@pytest.mark.parametrize(
    ("statuses", "measured", "skipped", "code"),
    [
        ({"full": "started", "compressed": "started"}, ("full", "compressed"), "", 0),
        ({"full": "started", "compressed": "started"}, ("full", "compressed"), "no room", 0),
        ({"full": "no room", "compressed": "started"}, ("compressed",), "", 0),
        ({"full": "started", "compressed": "started"}, (), "failed", 1),
        ({"full": "started", "compressed": "started"}, ("full", "compressed"), "failed", 1),
        ({"full": "failed", "compressed": "started"}, ("compressed",), "", 1),
        ({"full": "started", "compressed": "failed"}, ("full",), "", 1),
        ({"full": "started", "compressed": "no room"}, ("full",), "", 1),
        ({"full": "started", "compressed": "refused"}, ("full",), "", 3),
        ({"full": "started", "compressed": "started"}, ("full",), "no time", 4),
        ({"full": "started", "compressed": "started"}, (), "", 4),
        ({"full": "started"}, ("full",), "", 4),
    ],
)
def test_only_what_was_measured_on_every_side_has_passed(
    cases: ModuleType,
    decode: ModuleType,
    statuses: dict[str, str],
    measured: tuple[str, ...],
    skipped: str,
    code: int,
) -> None:
    """Regression: an engine that died in its first decode step, or had no time, had passed."""
    case = cases.all_cases(2048)["batches"]
    found = {
        "starts": [{"name": name, "status": status} for name, status in statuses.items()],
        "results": [{"context": 8192, **{name: {} for name in measured}}] if measured else [],
        "backlogs": {},
        "skipped": [{"status": skipped}] if skipped else [],
    }
    assert decode.exit_code(found, case) == code
    found |= {"results": [], "backlogs": dict.fromkeys(measured)}
    assert decode.exit_code(found, case) == code


def test_sides_one_after_another_run_in_the_way_of_the_first(
    cases: ModuleType, decode: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Regression: each group of sides began again with the first way. Compression is the first, so
    that it is not what has no time."""
    sides = sys.modules["gpu.sides"]
    starts = Starts({("compressed", sides.COMPILED): "failed"})
    monkeypatch.setattr(sides, "start", starts.start)
    both = {"full": cases.Side(), "compressed": cases.Side(cases.settings(2048))}
    size = cases.Size(cases.Case(both, backlog=cases.Backlog()), 128, pool_bytes=1 << 30)
    report = decode.Report(tmp_path / "card.json", {})
    monkeypatch.setattr(decode, "ended_after", lambda side, seconds: nullcontext())
    monkeypatch.setattr(decode, "one_backlog", lambda *arguments: None)
    ways = list(sides.WAYS)
    decode.run_case(size, tmp_path, report, tmp_path, time.monotonic(), 900.0, ways)
    made = [(start["name"], start["way"]) for start in report.found["starts"]]
    assert made == [
        ("compressed", sides.COMPILED),
        ("compressed", sides.GRAPHS),
        ("full", sides.GRAPHS),
    ]


@pytest.mark.parametrize(("start_s", "least_serve_s"), [(60.0, 20.0), (75.0, 10.0)])
def test_both_sides_of_a_card_are_filled_and_serve_equally_long_in_the_time_of_a_call(
    cases: ModuleType,
    decode: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_s: float,
    least_serve_s: float,
) -> None:
    """Regression: in four and a half minutes only full attention was measured, and a minute of
    them was left over."""
    sides = sys.modules["gpu.sides"]
    starts = Starts({}, seconds=start_s)
    monkeypatch.setattr(sides, "start", starts.start)
    monkeypatch.setattr(sides, "time", starts)
    monkeypatch.setattr(decode, "time", starts)
    monkeypatch.setattr(decode, "ended_after", lambda side, seconds: nullcontext())
    served: dict[str, float] = {}

    def one_backlog(
        report: Any, case: Any, name: str, process: Any, fill_s: float, serve_s: float
    ) -> None:
        assert fill_s >= decode.LEAST_FILL_S / 2
        starts.now += fill_s + serve_s
        served[name] = serve_s

    monkeypatch.setattr(decode, "one_backlog", one_backlog)
    size = cases.size_for(cases.all_cases(3072)["card24"], 139 << 30, 384)
    report = decode.Report(tmp_path / "card.json", {})
    decode.run_case(size, tmp_path, report, tmp_path, 0.0, 0.95 * 270, list(sides.WAYS))
    assert list(served) == ["compressed", "full"]
    assert least_serve_s <= served["compressed"] == served["full"] <= 60.0
    assert report.found["skipped"] == []
    assert 0.9 * 270 <= starts.now <= 0.95 * 270 + 1


TINY_ARGUMENTS = {
    "dtype": "float32",
    "load_format": "auto",
    "block_size": 32,
    "max_num_batched_tokens": 512,
    "disable_log_stats": True,
}


@pytest.fixture
def tiny_folder(sides: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model for engines that the CPU build serves."""
    from tiny_model import write_tiny_model

    paths = [str(BENCHMARKS), str(ROOT), str(ROOT / "kernels")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setattr(sides, "RUNNER", {})  # the CPU build runs V1 only
    return write_tiny_model(tmp_path / "model", num_layers=2, hidden_size=128, head_dim=32)


def test_engines_decode_in_turns_and_serve_a_backlog(
    cases: ModuleType, decode: ModuleType, tiny_folder: Path, tmp_path: Path
) -> None:
    """One case of each kind on the same two engines, and the pictures of what they found."""
    settings = {"method": "triattention", "budget": 256, "interval": 32, "window": 32}
    both = {
        name: cases.Side(own, TINY_ARGUMENTS)
        for name, own in (("full", None), ("compressed", settings))
    }
    backlog = cases.Backlog(total=900, prompt=64, num_waiting=8, seconds=2.0)
    loads = (cases.Load(512, 2), cases.Load(512, 2, 128), cases.Load(32_768, 1))
    shape = cases.Shape("tiny", 128, 512, 2, 4, 2, 32)
    case = cases.Case(both, loads, backlog, shape, together=True, eager=True, max_num_seqs=16)
    size = cases.Size(case, 64, pool_bytes=6 << 20)
    report = decode.Report(tmp_path / "engine.json", {})
    began = time.monotonic()
    decode.run_case(size, tiny_folder, report, tmp_path, began, 900.0, [])
    found = json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))
    assert [started["status"] for started in found["starts"]] == ["started", "started"], found
    assert decode.exit_code(found, case) == 0
    assert found["starts"][0]["engine"]["worker"].endswith("CPUWorker")
    result, smaller = found["results"]
    assert (result["budget"], smaller["budget"]) == (None, 128)
    assert result["compressed"]["rounds"] > 0
    held = [one["compressed"]["most_blocks_held"] for one in (smaller, result)]
    assert held[0] < held[1] < result["full"]["most_blocks_held"]
    assert len(result["full"]["slice_s"]) == 64 // decode.SLICE_STEPS
    between = result["slice_speedup"]
    assert 0 < between["p10"] <= result["speedup"] <= between["p90"]
    tpot = result["compressed"]["tpot_ms"]
    assert 0 < tpot["p50"] <= tpot["p99"]
    (skipped,) = found["skipped"]
    assert skipped["status"] == "no room"
    assert "full attention needs" in skipped["reason"]
    full, compressed = found["backlogs"]["full"], found["backlogs"]["compressed"]
    for own in (full, compressed):
        assert own["steps"] > 10
        assert own["tokens_per_s"] > 0
        assert own["held_at_the_end"] == 0
        assert len(own["moments"]["rows"]) > 5
        assert 0 < own["tpot_ms"]["p50"] <= own["tpot_ms"]["p99"]
        assert own["device_used_bytes"] is None, "there is no device"
    assert (full["rounds"], full["rounds_share"], full["round_ms"]) == (0, 0.0, None)
    assert compressed["rounds"] > 0
    assert 0 < compressed["rounds_share"] < 1
    assert compressed["round_ms"]["median"] > 0
    assert compressed["most_running"] > full["filled"]["first"]
    assert compressed["filled"]["first"] > full["filled"]["first"]
    assert full["filled"]["longest_prompt"] > 600
    assert compressed["filled"]["longest_prompt"] == case.sides["compressed"].most_prompt == 320
    assert compressed["serve_s"] == full["serve_s"] == backlog.seconds
    found |= {"conditions": {"device": "cpu", "commit": "abc"}, "case": asdict(case)}
    report = tmp_path / "card.json"
    report.write_text(json.dumps(found), encoding="utf-8")
    drawn = run_plot(str(report), "--into", str(tmp_path / "pictures"))
    assert drawn.returncode == 0, drawn.stderr
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"throughput.png", "running_card.png", "blocks_card.png"}
    report.write_text(json.dumps(found | {"results": [], "backlogs": {}}), encoding="utf-8")
    drawn = run_plot(str(report), "--into", str(tmp_path / "pictures"))
    assert drawn.returncode == 2
    assert "no load that both sides ran and no backlog" in drawn.stderr


def run_plot(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "plot.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_engine_is_held_against_the_float64_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu_script: Callable[[str], ModuleType],
) -> None:
    """A wrong number, a wrong choice and what a GPU would have seen are found."""
    dense = gpu_script("dense")
    seen: dict[str, Json] = {}
    judge = dense.judged

    def started(
        side: str, folder: Path, output: Path, way: str, seconds: float, length: int
    ) -> Json:
        result = folder / f"{side}.pt"
        arguments = (str(folder), side == "compressed", way, result, length)
        run_fresh(dense.observe, *arguments, environment={}, timeout=500)
        found = torch.load(result, weights_only=False)
        return {"status": "passed", "way": way, "found": found}

    def judged(folder: Path, full: Json, compressed: Json, least_rounds: int) -> list[Any]:
        seen.update(full=full, compressed=compressed)
        assert least_rounds == 1
        checks: list[Any] = judge(folder, full, compressed, 1)
        (few,) = (c for c in judge(folder, full, compressed, 2) if not c.passed)
        assert few.name == "rounds"
        watched = {"waits": {"model_runner.py:1": 3}, "kernels": {"score_kernel": 2}}
        full, compressed = deepcopy(full) | watched, deepcopy(compressed) | watched
        compressed["waits"] = {"model_runner.py:1": 3, "rounds.py:5": 1}
        compressed["kernels"] = {"score_kernel": 2, "compact_kernel": 11}
        compressed["short"][0].token_ids[-1] += 1
        compressed["long"][0].logprobs[-1][7] = -99.0
        wrong = {check.name for check in judge(folder, full, compressed, 1) if not check.passed}
        assert wrong == {"below the trigger", "rounds", "waiting for the device", "kernels"}
        kept = compressed["long"][0].lives[0].kept[0][0]
        kept[0, 0, -1] = kept[0, 0, -2]
        again = {check.name: check for check in judge(folder, full, compressed, 1)}
        assert "each of them once" in again["rounds"].found
        return checks

    monkeypatch.setattr(dense, "started", started)
    monkeypatch.setattr(dense, "judged", judged)
    monkeypatch.setattr(dense, "PROMPTS", (50,))
    monkeypatch.setattr(dense, "SHORT", 8)
    report = dense.run(tmp_path / "dense.json", 500.0, "abc", 120, ["eager"])
    assert [check["name"] for check in report["checks"]] == [
        "below the trigger",
        "rounds",
        "blocks",
    ]
    assert all(check["passed"] for check in report["checks"]), report["checks"]
    assert dense.exit_code(report) == 4, "eager engines say nothing of CUDA graphs"
    report["starts"][-1]["way"] = dense.GRAPHS
    assert dense.exit_code(report) == 0
    assert dense.exit_code(report | {"checks": [{"passed": False}]}) == 1
    assert dense.exit_code(report | {"checks": []}) == 2
    assert seen["compressed"]["long"][0].num_rounds == 1
    written = json.loads((tmp_path / "dense.json").read_text(encoding="utf-8"))
    assert written["checks"] == report["checks"]


def test_a_refusal_and_a_broken_start_are_told_apart(
    sides: ModuleType, tiny_folder: Path, tmp_path: Path
) -> None:
    """The first as on CUDA while there is no worker for it. A cache without room for a request is
    neither, and would be in every way: regression, it was started in three."""
    request = {"model": str(tiny_folder), "arguments": TINY_ARGUMENTS}
    with ExitStack() as stack:
        refused = request | {"settings": {"budget": -1}}
        found = sides.start(stack, "compressed", refused, "eager", tmp_path, 300.0)
        assert found["status"] == "refused"
        assert "budget" in found["reason"]
        small = {"kv_cache_memory_bytes": 1 << 16, "max_model_len": 4096}
        no_room = request | {"arguments": TINY_ARGUMENTS | small, "settings": None}
        found = sides.start(stack, "small", no_room, "eager", tmp_path, 300.0)
        assert found["status"] == "no room"
        assert "To serve at least one request" in found["reason"]
        broken = request | {"model": str(tmp_path / "gone"), "settings": None}
        found = sides.start(stack, "full", broken, "eager", tmp_path, 300.0)
        assert found["status"] == "failed"
        assert found["log"]
