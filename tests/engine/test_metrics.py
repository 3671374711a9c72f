"""What the engine's processes count, read as a scrape reads it; and how the files come and go."""

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from engine_runs import ModelFolder, random_prompt, run_engine
from full_disk import full_disk
from pool_world import IN_WORLD, PoolWorld
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sample_names import sample_names
from vllm.v1.core.sched.output import SchedulerOutput

from triattention_vllm.engine import periodic_log, round_time
from triattention_vllm.engine.metrics_file import MetricsFile, owning_process
from triattention_vllm.engine.metrics_folder import FolderCollector
from triattention_vllm.engine.periodic_log import PeriodicLog
from triattention_vllm.engine.round_time import RoundTime
from triattention_vllm.engine.step_counts import STEP_METRICS, StepCounts
from triattention_vllm.errors import MetricsError
from triattention_vllm.metrics import (
    CACHED_TOKENS_NOW,
    LABELS,
    METRICS,
    PREFIX,
    REQUEST_CACHED_TOKENS,
    ROUND_TIME,
    ROUNDS,
)

LABELLED = {"model_name": "tiny", "engine": "0"}


def scraped(folder: Path) -> dict[str, float]:
    """Sample -> value as an HTTP scrape shows it; a bucket's name carries its bound."""
    registry = CollectorRegistry()
    registry.register(FolderCollector(folder))
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert {name: sample.labels[name] for name in LABELS} == LABELLED
            bound = f"<={sample.labels['le']}" if "le" in sample.labels else ""
            samples[sample.name.removeprefix(PREFIX) + bound] = sample.value
    return samples


def counted(folder: Path) -> dict[str, float]:
    """Our counters and histograms in a folder whose processes have ended."""
    return {
        sample.name.removeprefix(PREFIX): sample.value
        for family in FolderCollector(folder).collect()
        for sample in family.samples
        if sample.name.startswith(PREFIX) and "le" not in sample.labels
    }


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_every_metric_is_there_from_the_beginning(tmp_path: Path) -> None:
    MetricsFile(tmp_path, LABELLED, METRICS)
    names = {name.partition("<=")[0] for name in scraped(tmp_path)}
    declared = {name.removeprefix(PREFIX) for m in METRICS for name in sample_names(m)}
    assert names == declared


def test_two_writers_are_added_up_and_buckets_accumulate(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, LABELLED, METRICS)
    second = MetricsFile(tmp_path, LABELLED, METRICS)
    first.add(ROUNDS, 3)
    first.add(ROUNDS)
    second.add(ROUNDS, 5)
    for seconds in (0.001, 0.0011, 7.0):
        first.observe(ROUND_TIME, seconds)
    samples = scraped(tmp_path)
    assert samples["rounds_total"] == 9
    buckets = {
        name: value for name, value in samples.items() if name.startswith("round_time_seconds_b")
    }
    assert buckets["round_time_seconds_bucket<=0.0005"] == 0
    assert buckets["round_time_seconds_bucket<=0.001"] == 1
    assert buckets["round_time_seconds_bucket<=0.002"] == 2
    assert buckets["round_time_seconds_bucket<=2.0"] == 2
    assert buckets["round_time_seconds_bucket<=+Inf"] == 3
    assert samples["round_time_seconds_count"] == 3
    assert samples["round_time_seconds_sum"] == pytest.approx(7.0021)


def test_the_gauges_of_a_process_that_died_go_and_its_counts_stay(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path\n"
        "from triattention_vllm.engine.metrics_file import MetricsFile\n"
        "from triattention_vllm.metrics import CACHED_TOKENS_NOW, METRICS, ROUNDS\n"
        f"file = MetricsFile(Path({str(tmp_path)!r}), {LABELLED!r}, METRICS)\n"
        "file.add(ROUNDS, 4); file.set(CACHED_TOKENS_NOW, 100)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.raises(subprocess.CalledProcessError):
        run_python(code)
    alive = MetricsFile(tmp_path, LABELLED, METRICS)
    alive.set(CACHED_TOKENS_NOW, 7)
    assert {owning_process(file) for file in tmp_path.glob("*.db")} > {os.getpid()}
    samples = scraped(tmp_path)
    assert samples["rounds_total"] == 4
    assert samples["cached_tokens"] == 7


def test_an_engine_that_ends_takes_its_gauges_along(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, LABELLED, METRICS)
    file.add(ROUNDS, 2)
    file.set(CACHED_TOKENS_NOW, 5)
    file.close()
    samples = scraped(tmp_path)
    assert samples["rounds_total"] == 2
    assert "cached_tokens" not in samples


def test_files_of_prometheus_clients_own_stand_beside_ours(tmp_path: Path) -> None:
    """As in vLLM's folder, where its own metrics of the same process may be."""
    code = (
        "import os; from pathlib import Path\n"
        "from prometheus_client import Counter\n"
        "from triattention_vllm.engine.metrics_file import MetricsFile\n"
        "from triattention_vllm.metrics import METRICS, ROUNDS\n"
        "other = Counter('vllm:other', 'of vLLM', ['model_name', 'engine']).labels('tiny', '0')\n"
        f"file = MetricsFile(Path({str(tmp_path)!r}), {LABELLED!r}, METRICS)\n"
        "for _ in range(3): other.inc(); file.add(ROUNDS)\n"
    )
    run_python(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    samples = scraped(tmp_path)
    assert samples["rounds_total"] == 3
    assert samples["vllm:other_total"] == 3


OWN_FOLDER = """
import os
from pathlib import Path
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from triattention_vllm.engine.metrics_file import MetricsFile
from triattention_vllm.engine.metrics_folder import share_metrics_folder
from triattention_vllm.metrics import METRICS

share_metrics_folder(log_stats=True)
folder = Path(os.environ["TRIATTENTION_METRICS_FOLDER"])
share_metrics_folder(log_stats=True)
assert folder == Path(os.environ["TRIATTENTION_METRICS_FOLDER"])
print(folder, oct(folder.stat().st_mode), flush=True)  # a fork would inherit the buffer
unregister_vllm_metrics()
MetricsFile(folder, {"model_name": "tiny", "engine": "0"}, METRICS)
assert b"triattention:rounds_total{" in generate_latest(REGISTRY)
child = os.fork()
if child == 0:
    raise SystemExit
os.waitpid(child, 0)
assert folder.is_dir(), "a forked child took the folder away"
share_metrics_folder(log_stats=False)
assert "TRIATTENTION_METRICS_FOLDER" not in os.environ
"""


def test_the_folder_is_private_and_goes_with_its_process_alone() -> None:
    inherited = {"TRIATTENTION_METRICS_FOLDER": "/of/another/server"}
    folder, mode = run_python(OWN_FOLDER, **inherited).stdout.split()
    assert stat.S_IMODE(int(mode, 8)) == 0o700
    assert not Path(folder).exists()


def test_several_api_servers_read_vllms_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triattention_vllm.engine.metrics_folder import share_metrics_folder

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("TRIATTENTION_METRICS_FOLDER", "/of/another/server")
    share_metrics_folder(log_stats=True)
    assert os.environ["TRIATTENTION_METRICS_FOLDER"] == str(tmp_path)


class Steps:
    """A small pool whose steps are counted as the scheduler counts them."""

    def __init__(self, folder: Path) -> None:
        self.world = PoolWorld(IN_WORLD, 4, 100)
        self.log = PeriodicLog(3600)
        metrics = MetricsFile(folder, LABELLED, STEP_METRICS)
        self.counts = StepCounts([self.world.manager], metrics, self.log)

    def step(self, *finished: str) -> None:
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = set(finished)
        plans = self.world.step()
        running = [live.request for live in self.world.live.values()]
        self.counts.count(output, plans, running)


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def test_the_counters_are_the_sums_over_all_rounds(steps: Steps, tmp_path: Path) -> None:
    steps.world.add("a", list(range(40)))
    steps.world.add("b", list(range(20)))
    for _ in range(60):
        steps.step()
    plans = steps.world.plans
    samples = scraped(tmp_path)
    assert samples["rounds_total"] == len(plans) > 8
    assert samples["freed_blocks_total"] == sum(plan.num_freed_blocks for plan in plans)
    assert samples["evicted_tokens_total"] == 4 * samples["freed_blocks_total"]
    assert samples["compressed_requests_total"] == 2
    assert samples["deferred_rounds_total"] == 0
    # Both requests had hashed all their full blocks before their first round.
    assert samples["copy_on_write_blocks_total"] == sum(p.num_private_blocks for p in plans) > 0
    logical = sum(live.request.num_computed_tokens for live in steps.world.live.values())
    evicted = 4 * sum(steps.world.manager.num_null_blocks.values())
    assert samples["logical_tokens"] == logical
    assert samples["cached_tokens"] == logical - evicted < 2 * (48 + 8 + 1)


def test_a_request_that_ends_is_observed_once_with_its_most_cached_tokens(
    steps: Steps, tmp_path: Path
) -> None:
    steps.world.add("a", list(range(40)))
    for _ in range(60):
        steps.step()
    steps.world.finish("a")
    steps.step("a", "never-ran")
    steps.step()
    samples = scraped(tmp_path)
    assert samples["request_max_cached_tokens_count"] == 1
    assert 48 < samples["request_max_cached_tokens_sum"] <= 48 + 8 + 1
    assert samples["cached_tokens"] == samples["logical_tokens"] == 0
    assert steps.counts.max_cached == {}
    assert steps.counts.compressed == set()


def test_a_round_that_waits_is_counted_in_each_step(steps: Steps, tmp_path: Path) -> None:
    steps.world.add("a", list(range(40)))
    steps.world.manager.num_deferred_rounds = 3
    steps.step()
    steps.step()
    steps.world.manager.num_deferred_rounds = 4
    steps.step()
    assert scraped(tmp_path)["deferred_rounds_total"] == 4


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logged: list[str] = []
    monkeypatch.setattr(periodic_log.logger, "info", logged.append)
    return logged


def test_the_log_line_says_what_an_interval_freed(lines: list[str]) -> None:
    log = PeriodicLog(3600)
    log.count(0, 5, 1000, 1000)  # before the first round: of no interval
    log.count(1284, 0, 2000, 200)
    log.count(0, 1, 2040, 200)
    log.stop()
    assert lines == ["KV compression: 1,284 blocks freed, 10.1x fewer cached tokens, 1 preemptions"]


def test_an_interval_ends_by_itself_and_a_quiet_engine_logs_nothing(lines: list[str]) -> None:
    log = PeriodicLog(0.05)
    log.count(2, 0, 100, 50)
    deadline = time.monotonic() + 30
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)
    log.count(0, 0, 100, 50)
    time.sleep(0.2)
    log.stop()
    assert lines == ["KV compression: 2 blocks freed, 2.0x fewer cached tokens, 0 preemptions"]


def test_rounds_that_run_together_share_their_time(tmp_path: Path) -> None:
    timer = RoundTime(MetricsFile(tmp_path, LABELLED, [ROUND_TIME]), torch.device("cpu"))
    with timer.measured(4):
        time.sleep(0.04)
    timer.read_finished()
    samples = scraped(tmp_path)
    assert samples["round_time_seconds_count"] == 4
    assert samples["round_time_seconds_sum"] >= 0.04
    assert samples["round_time_seconds_bucket<=0.005"] == 0


class Event:
    """Stands for a torch.cuda.Event: passed once ``now`` has reached the moment it was recorded."""

    now = 0.0
    clock = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 3.0
        self.at = Event.clock

    def query(self) -> bool:
        return self.at <= Event.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_on_a_gpu_times_are_read_only_after_the_device_passed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_time.torch.cuda, "Event", Event)
    timer = RoundTime(MetricsFile(tmp_path, LABELLED, [ROUND_TIME]), torch.device("cuda"))
    for num_rounds in (1, 3):
        with timer.measured(num_rounds):
            pass
    timer.read_finished()
    assert scraped(tmp_path)["round_time_seconds_count"] == 0
    Event.now = 6.0
    timer.read_finished()
    assert scraped(tmp_path)["round_time_seconds_count"] == 1
    Event.now = 12.0
    timer.read_finished()
    samples = scraped(tmp_path)
    assert samples["round_time_seconds_count"] == 4
    assert samples["round_time_seconds_sum"] == pytest.approx(0.006)


def test_the_stand_in_has_the_methods_of_torchs_event() -> None:
    for name in ("record", "query", "elapsed_time"):
        # Not torch.cuda.Event, which vLLM's CPU build replaces by a stand-in of its own.
        assert callable(vars(torch.cuda.streams.Event)[name])


def test_an_offline_engine_counts_its_last_requests_too(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It schedules no further step once all have finished."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    run = run_engine(
        model_folder("qwen3"),
        [random_prompt(20, 0), random_prompt(30, 1)],
        300,
        {"budget": 128, "interval": 32, "window": 32},
        max_model_len=512,
        disable_log_stats=False,
    )
    counts = counted(tmp_path)
    num_rounds = sum(len(request.kept) for request in run.requests)
    assert counts["rounds_total"] == counts["round_time_seconds_count"] == num_rounds > 4
    assert counts["request_max_cached_tokens_count"] == 2
    assert counts["request_max_cached_tokens_sum"] == 2 * (128 + 32)
    assert "cached_tokens" not in counts


def test_names_follow_prometheus_and_keep_clear_of_vllms() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"triattention:[a-z_]+[a-z]", metric.name)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert bool(metric.buckets) == (metric.kind == "histogram")
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)


def test_a_requests_own_bucket_is_the_first_that_is_not_below(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, LABELLED, METRICS)
    file.observe(REQUEST_CACHED_TOKENS, 2048)
    file.observe(REQUEST_CACHED_TOKENS, 2049)
    samples: Mapping[str, float] = scraped(tmp_path)
    assert samples["request_max_cached_tokens_bucket<=2048.0"] == 1
    assert samples["request_max_cached_tokens_bucket<=3072.0"] == 2


def test_a_full_disk_is_an_error_before_anything_counts(tmp_path: Path) -> None:
    """A memory map of blocks that the disk cannot give would end the process without a word."""
    with full_disk(4096), pytest.raises(MetricsError, match="make room there, set TMPDIR"):
        MetricsFile(tmp_path, LABELLED, METRICS)
    assert list(tmp_path.iterdir()) == []
    MetricsFile(tmp_path, LABELLED, METRICS).add(ROUNDS)
    (counters,) = tmp_path.glob("counter_*.db")
    assert counters.stat().st_blocks * 512 >= counters.stat().st_size > 0
    assert scraped(tmp_path)["rounds_total"] == 1
